// Mutates the shipped configs: whatever the text, it either parses to sane sizes or is refused with a
// UserError. Deterministic: the seed of a round is its number, and a failure prints the round.
// MOP_FUZZ_SECONDS sets the time (10 s by default).
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <random>
#include <string_view>

#include "sim/model/counts.h"
#include "tests/model/support.h"

namespace mop::model {
namespace {

using Random = std::mt19937_64;

size_t below(Random& random, size_t limit) {
  return limit == 0 ? 0 : random() % limit;
}

template <typename T, size_t N>
const T& pick(Random& random, const T (&choices)[N]) {
  return choices[below(random, N)];
}

constexpr std::string_view kExtremes[] = {
    "0",
    "-1",
    "1",
    "2",
    "3",
    "7",
    "64",
    "4096",
    "4097",
    "16384",
    "262144",
    "1048576",
    "67108864",
    "2147483648",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "-9223372036854775808",
    "1e308",
    "1e-308",
    "1e999",
    "-0.0",
    "0.5",
    "NaN",
    "Infinity",
    "null",
    "true",
    "false",
    "[]",
    "{}",
    "\"\"",
    "\"8\"",
    "[[[[]]]]",
    "{\"factor\": 4, \"type\": \"yarn\"}",
    "[0, 1]",
    "[-1]",
    "\"sliding_attention\"",
    "\"\\u0000\"",
    "\"\\ud800\"",
};

// [begin, end) of the JSON value after the key that starts at or after `from`.
std::pair<size_t, size_t> value_after(const std::string& text, size_t from) {
  const size_t colon = text.find(": ", from);
  if (colon == std::string::npos) return {text.size(), text.size()};
  const size_t end = text.find_first_of(",\n", colon + 2);
  return {colon + 2, end == std::string::npos ? text.size() : end};
}

std::string key_after(const std::string& text, size_t from) {
  const size_t open = text.find("\n  \"", from);
  if (open == std::string::npos) return "hidden_size";
  const size_t close = text.find('"', open + 4);
  return close == std::string::npos ? "hidden_size" : text.substr(open + 4, close - open - 4);
}

void mutate(std::string& text, const std::string& other, Random& random) {
  const size_t at = below(random, text.size());
  switch (below(random, 8)) {
    case 0:  // flip bits of a byte
      if (!text.empty()) text[at] = static_cast<char>(text[at] ^ static_cast<char>(1u << below(random, 8)));
      break;
    case 1:  // truncate
      if (below(random, 8) == 0) text.resize(at);
      break;
    case 2: {  // another value for a field
      const auto [begin, end] = value_after(text, at);
      text.replace(begin, end - begin, pick(random, kExtremes));
      break;
    }
    case 3: {  // another field's value, perhaps another model's
      const auto [begin, end] = value_after(text, at);
      const auto [from, to] = value_after(other, below(random, other.size()));
      text.replace(begin, end - begin, other.substr(from, to - from));
      break;
    }
    case 4: {  // drop a line
      const size_t begin = text.find('\n', at);
      if (begin == std::string::npos) break;
      const size_t end = text.find('\n', begin + 1);
      text.erase(begin, end == std::string::npos ? end : end - begin);
      break;
    }
    case 5: {  // a field more
      const size_t brace = text.find('{');
      if (brace == std::string::npos) break;
      text.insert(brace + 1, "\"" + key_after(other, below(random, other.size())) +
                                 "\": " + std::string(pick(random, kExtremes)) + ",\n");
      break;
    }
    case 6: {  // change a digit
      const size_t digit = text.find_first_of("0123456789", at);
      if (digit != std::string::npos) text[digit] = static_cast<char>('0' + below(random, 10));
      break;
    }
    default: {  // repeat a piece, now and then very often
      const std::string piece = text.substr(at, 1 + below(random, 40));
      std::string repeated;
      for (size_t i = below(random, 16) == 0 ? 2000 : 1; i > 0; --i) repeated += piece;
      text.insert(at, repeated);
    }
  }
}

// Every promise that the rest of the product builds on.
void expect_sane(const ModelConfig& c) {
  const auto within = [](int64_t value, int64_t low, int64_t high) { return value >= low && value <= high; };
  EXPECT_TRUE(within(c.layers, 1, 4096));
  EXPECT_TRUE(within(c.hidden, 1, 1 << 18));
  EXPECT_TRUE(within(c.vocab, 1, 1 << 26));
  EXPECT_GE(c.max_positions, 1);
  EXPECT_EQ(c.window.size(), static_cast<size_t>(c.layers));
  EXPECT_EQ(c.moe.size(), static_cast<size_t>(c.layers));
  EXPECT_TRUE(within(c.moe_layers(), 1, c.layers));
  for (const int64_t window : c.window) EXPECT_GE(window, 0);
  EXPECT_TRUE(within(c.top_k, 1, c.experts));
  EXPECT_GE(c.kv_heads, 1);
  EXPECT_EQ(c.heads % c.kv_heads, 0);
  EXPECT_GE(c.qk_dim(), 1);
  EXPECT_GE(c.v_dim(), 1);
  EXPECT_GE(c.expert_intermediate, 1);
  EXPECT_GE(c.shared_intermediate, 0);
  EXPECT_EQ(c.dense_intermediate > 0, c.moe_layers() < c.layers);
  EXPECT_EQ(c.experts % c.router_groups, 0);
  EXPECT_TRUE(within(c.router_top_groups, 1, c.router_groups));
  for (const double value : {c.norm_eps, c.rope_theta, c.rotary_fraction, c.rope.factor, c.rope.beta_fast,
                             c.rope.beta_slow, c.routed_scale})
    EXPECT_TRUE(std::isfinite(value) && value > 0);
  const Parameters p = count_parameters(c);
  EXPECT_TRUE(within(p.total, 1, int64_t{1'000'000'000'000'000}));
  EXPECT_TRUE(within(p.active, 1, p.total));
  EXPECT_TRUE(within(p.active_without_embedding, 1, p.active));
  EXPECT_TRUE(std::isfinite(flops_per_token(c, 131072).total()));
}

TEST(ConfigFuzz, MutatedConfigsParseOrAreRefused) {
  const char* setting = std::getenv("MOP_FUZZ_SECONDS");
  const double seconds = setting != nullptr ? std::atof(setting) : 10;
  std::vector<std::string> texts;
  for (const std::string& name : shipped_models()) texts.push_back(testing::shipped_text(name));
  ASSERT_FALSE(texts.empty());

  int64_t rounds = 0, parsed = 0;
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  for (; elapsed() < seconds && !HasFailure(); ++rounds) {
    Random random(static_cast<uint64_t>(rounds));
    std::string text = texts[below(random, texts.size())];
    const std::string& other = texts[below(random, texts.size())];
    for (size_t edits = 1 + below(random, 6); edits > 0; --edits) mutate(text, other, random);
    SCOPED_TRACE("round " + std::to_string(rounds));
    try {
      expect_sane(parse_config(text, "fuzz"));
      ++parsed;
    } catch (const UserError& error) {
      const std::string_view message = error.what();
      EXPECT_EQ(message.substr(0, 6), "fuzz: ") << message;
      EXPECT_EQ(message.find('\n'), std::string_view::npos) << message;
      EXPECT_LT(message.size(), 400u) << message;
    } catch (const std::exception& error) {
      ADD_FAILURE() << "not a UserError: " << error.what();
    }
  }
  std::printf("%lld configs in %.0f s: %lld parsed, %lld refused\n", static_cast<long long>(rounds),
              elapsed(), static_cast<long long>(parsed), static_cast<long long>(rounds - parsed));
  RecordProperty("rounds", static_cast<int>(rounds));
  // Both ways out must have been taken, or the mutations test nothing.
  if (seconds >= 1) {
    EXPECT_GT(parsed, 0);
    EXPECT_GT(rounds, parsed);
  }
}

}  // namespace
}  // namespace mop::model
