#include "sim/model/rope.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>

#include "sim/base/error.h"

namespace mop::model {
namespace {

// DeepSeek's families, whose weights pair neighbours and whose softmax is scaled with the context.
bool is_deepseek(const ModelConfig& config) {
  static constexpr std::array kTypes{"deepseek_v2", "deepseek_v3", "kimi_k2"};
  return std::find(kTypes.begin(), kTypes.end(), config.model_type) != kTypes.end();
}

double magnitude(double factor, double mscale) {
  return factor <= 1 ? 1 : 0.1 * mscale * std::log(factor) + 1;
}

// What cosines and sines are multiplied by.
double attention_factor(const RopeScaling& scaling) {
  if (scaling.mscale != 0 && scaling.mscale_all_dim != 0)
    return magnitude(scaling.factor, scaling.mscale) / magnitude(scaling.factor, scaling.mscale_all_dim);
  return magnitude(scaling.factor, 1);
}

// (width / 2) radians a position. In fp32 as transformers has them: far positions show the difference.
std::vector<float> frequencies(const ModelConfig& config, int64_t width) {
  const RopeScaling& scaling = config.rope;
  // The pair that makes this many turns over the original context.
  const auto pair_of = [&](double turns) {
    return static_cast<double>(width) *
           std::log(static_cast<double>(scaling.original_positions) / (turns * 2 * std::numbers::pi)) /
           (2 * std::log(config.rope_theta));
  };
  double low = 0, high = 0;
  if (scaling.factor != 1) {
    low = pair_of(scaling.beta_fast);
    high = pair_of(scaling.beta_slow);
    if (scaling.truncate) low = std::floor(low), high = std::ceil(high);
    low = std::max(low, 0.0);
    high = std::min(high, static_cast<double>(width - 1));
    if (low == high) high += 0.001;  // no division by zero
  }
  std::vector<float> result;
  for (int64_t i = 0; i < width / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(width);
    const float period = static_cast<float>(std::pow(config.rope_theta, static_cast<double>(exponent)));
    float frequency = 1 / period;
    if (scaling.factor != 1) {
      const float slow = 1 / (static_cast<float>(scaling.factor) * period);
      const float ramp = (static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(high - low);
      const float keep = 1 - std::clamp(ramp, 0.0F, 1.0F);
      frequency = slow * (1 - keep) + frequency * keep;
    }
    result.push_back(frequency);
  }
  return result;
}

}  // namespace

Rope make_rope(const ModelConfig& config, int64_t positions) {
  ensure(positions > 0, "a context has positions");
  Rope rope;
  rope.positions = positions;
  rope.width = config.rotary_dim();
  rope.interleaved = is_deepseek(config);
  rope.attention_scale = 1 / std::sqrt(static_cast<double>(config.qk_dim()));
  if (is_deepseek(config) && config.rope.mscale_all_dim != 0)
    rope.attention_scale *= std::pow(magnitude(config.rope.factor, config.rope.mscale_all_dim), 2);

  const std::vector<float> frequency = frequencies(config, rope.width);
  const float factor = static_cast<float>(attention_factor(config.rope));
  rope.cos.reserve(static_cast<size_t>(positions) * frequency.size());
  rope.sin.reserve(rope.cos.capacity());
  for (int64_t position = 0; position < positions; ++position) {
    for (const float f : frequency) {
      const float angle = static_cast<float>(position) * f;
      rope.cos.push_back(static_cast<float>(std::cos(static_cast<double>(angle))) * factor);
      rope.sin.push_back(static_cast<float>(std::sin(static_cast<double>(angle))) * factor);
    }
  }
  return rope;
}

}  // namespace mop::model
