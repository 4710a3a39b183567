#include <complex>

#include "tests/exec/cpu/support.h"

namespace mop::cpu {
namespace {

constexpr int64_t kPositions = 50;

Setting rotary(const std::string& model_type, int64_t head_dim, double fraction) {
  Setting setting;
  setting.model.model_type = model_type;
  setting.model.head_dim = setting.model.qk_rope_dim = head_dim;
  setting.model.attention = model_type == "deepseek_v3" ? model::Attention::mla : model::Attention::gqa;
  setting.model.rotary_fraction = fraction;
  setting.model.rope_theta = 10000;
  setting.rope = model::make_rope(setting.model, kPositions);
  return setting;
}

struct Rotation {
  int64_t head, first, rotated;
  bool interleaved;
};

Values normalised(const Values& x, const Values& w) {
  const size_t d = w.size();
  Values y = x;
  for (size_t at = 0; at < x.size(); at += d) {
    double squares = 0;
    for (size_t i = 0; i < d; ++i) squares += x[at + i] * x[at + i];
    for (size_t i = 0; i < d; ++i) y[at + i] *= w[i] / std::sqrt(squares / static_cast<double>(d) + 1e-5);
  }
  return y;
}

// Pairs as complex numbers times e^(i position theta^(-2j / width)).
Values reference(const Values& raw, const Values& w, const Values& positions, int64_t cols,
                 const Rotation& rotation) {
  Values x = w.empty() ? raw : normalised(raw, w);
  for (size_t t = 0; t < positions.size(); ++t) {
    for (int64_t head = 0; head < cols / rotation.head; ++head) {
      const size_t at =
          t * static_cast<size_t>(cols) + static_cast<size_t>(head * rotation.head + rotation.first);
      for (int64_t j = 0; j < rotation.rotated / 2; ++j) {
        double& a = x[at + static_cast<size_t>(rotation.interleaved ? 2 * j : j)];
        double& b = x[at + static_cast<size_t>(rotation.interleaved ? 2 * j + 1 : j + rotation.rotated / 2)];
        const double angle = positions[t] * std::pow(10000.0, -2.0 * static_cast<double>(j) /
                                                                  static_cast<double>(rotation.rotated));
        const std::complex<double> turned = std::complex(a, b) * std::polar(1.0, angle);
        a = turned.real();
        b = turned.imag();
      }
    }
  }
  return x;
}

Values any_positions(int64_t t) {
  Values positions;
  for (int64_t i = 0; i < t; ++i) positions.push_back(static_cast<double>(uniform(0, kPositions - 1)));
  return positions;
}

Does does_of(const Rotation& rotation) {
  Does does;
  does.a = static_cast<int32_t>(rotation.head);
  does.b = static_cast<int32_t>(rotation.first);
  does.c = static_cast<int32_t>(rotation.rotated);
  return does;
}

struct Case {
  const char* model_type;
  double fraction;  // of the first `head` elements that rope knows
  Rotation rotation;
};
const Case kCases[] = {
    {"qwen3_moe", 1, {8, 0, 8, false}},
    {"glm4_moe", 0.5, {12, 0, 6, false}},
    {"deepseek_v3", 1, {14, 8, 6, true}},  // nope, then rope
    {"deepseek_v3", 1, {6, 0, 6, true}},   // k_rope alone
};
Setting setting_of(const Case& c) {
  const bool mla = c.model_type == std::string("deepseek_v3");
  return rotary(c.model_type, mla ? c.rotation.rotated : c.rotation.head, c.fraction);
}

TEST(Rope, TurnsPairsByTheirPosition) {
  for (const Case& c : kCases) {
    for (const Type type : kReals) {
      for (const int norm : {0, 1, 2}) {  // none; over each head; over the full width
        const int64_t t = 9, cols = 3 * c.rotation.head, d = norm == 1 ? c.rotation.head : cols;
        Tensor x = Tensor::random(t, cols, type), y(t, cols, type), w = Tensor::random(1, d, type);
        Tensor positions = Tensor::contiguous(1, t, any_positions(t), Type::i32);
        const Values want =
            reference(x.values(), norm != 0 ? w.values() : Values{}, positions.values(), cols, c.rotation);
        run_op(OpKind::rope, does_of(c.rotation), {&x, &positions, norm != 0 ? &w : nullptr}, {&y},
               setting_of(c));
        expect_close(y, want);
        // In place.
        run_op(OpKind::rope, does_of(c.rotation), {&x, &positions, norm != 0 ? &w : nullptr}, {&x},
               setting_of(c));
        EXPECT_EQ(x.values(), y.values());
      }
    }
  }
}

TEST(Rope, BackwardIsTheDerivative) {
  for (const Case& c : kCases) {
    for (const int norm : {0, 1, 2}) {
      for (const bool accumulate : {false, true}) {
        const int64_t t = 4, cols = 2 * c.rotation.head, d = norm == 1 ? c.rotation.head : cols;
        Tensor x = Tensor::random(t, cols), dy = Tensor::random(t, cols), dx(t, cols),
               w = Tensor::random(1, d), dw = Tensor::random(1, d);
        Tensor positions = Tensor::contiguous(1, t, any_positions(t), Type::i32);
        const Values weights = norm != 0 ? w.values() : Values{};
        const auto loss = [&](const Values& moved, const Values& moved_weights) {
          return dot(reference(moved, moved_weights, positions.values(), cols, c.rotation), dy.values());
        };
        const Values want_dx =
            numeric_gradient([&](const Values& moved) { return loss(moved, weights); }, x.values());
        Values want_dw =
            numeric_gradient([&](const Values& moved) { return loss(x.values(), moved); }, weights);
        if (norm != 0 && accumulate) want_dw = plus(want_dw, dw.values());
        const Values first_dw = dw.values();
        Does does = does_of(c.rotation);
        does.accumulate = accumulate;
        std::vector<Tensor*> out{&dx};
        if (norm != 0) out.push_back(&dw);
        run_op(OpKind::rope_bwd, does, {&dy, &positions, norm != 0 ? &x : nullptr, norm != 0 ? &w : nullptr},
               out, setting_of(c));
        expect_close(dx, want_dx);
        if (norm != 0) expect_close(dw, want_dw);
        // In place.
        dw.set(first_dw);
        out[0] = &dy;
        run_op(OpKind::rope_bwd, does, {&dy, &positions, norm != 0 ? &x : nullptr, norm != 0 ? &w : nullptr},
               out, setting_of(c));
        EXPECT_EQ(dy.values(), dx.values());
      }
    }
  }
}

TEST(Rope, RefusesPositionsBeyondTheTables) {
  const Case& c = kCases[0];
  Tensor x = Tensor::random(1, 8), y(1, 8);
  for (const double position : {-1.0, static_cast<double>(kPositions)}) {
    Tensor positions = Tensor::contiguous(1, 1, {position}, Type::i32);
    EXPECT_THROW(run_op(OpKind::rope, does_of(c.rotation), {&x, &positions}, {&y}, setting_of(c)),
                 InternalError);
  }
}

TEST(MlaKeys, EveryHeadEndsWithTheRotatedKey) {
  const int64_t t = 5, heads = 3, nope = 4, value = 6, rotary = 2;
  Does does;
  does.a = nope, does.b = value, does.c = rotary;
  for (const Type type : kReals) {
    Tensor kv = Tensor::random(t, heads * (nope + value), type), k_rope = Tensor::random(t, rotary, type),
           k(t, heads * (nope + rotary), type), v(t, heads * value, type);
    run_op(OpKind::mla_keys, does, {&kv, &k_rope}, {&k, &v});
    for (int64_t r = 0; r < t; ++r) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t i = 0; i < nope + rotary; ++i)
          EXPECT_EQ(
              k.at((r * heads + h) * (nope + rotary) + i),
              i < nope ? kv.at((r * heads + h) * (nope + value) + i) : k_rope.at(r * rotary + i - nope));
        for (int64_t i = 0; i < value; ++i)
          EXPECT_EQ(v.at((r * heads + h) * value + i), kv.at((r * heads + h) * (nope + value) + nope + i));
      }
    }
  }
}

// <mla_keys(kv, k_rope), (dk, dv)> = <(kv, k_rope), mla_keys_bwd(dk, dv)>, as forward is linear; element by
// element with unit vectors.
TEST(MlaKeys, BackwardIsTheTranspose) {
  const int64_t t = 3, heads = 2, nope = 3, value = 2, rotary = 4;
  Does does;
  does.a = nope, does.b = value, does.c = rotary;
  Tensor dk = Tensor::random(t, heads * (nope + rotary)), dv = Tensor::random(t, heads * value),
         dkv(t, heads * (nope + value)), dk_rope = Tensor::random(t, rotary);
  const Values before = dk_rope.values();
  does.accumulate = true;
  run_op(OpKind::mla_keys_bwd, does, {&dk, &dv}, {&dkv, &dk_rope});
  const auto transposed = [&](size_t unit, bool of_rope) {
    Values kv(static_cast<size_t>(dkv.size())), rope(static_cast<size_t>(dk_rope.size()));
    (of_rope ? rope : kv)[unit] = 1;
    Tensor a = Tensor::of(t, heads * (nope + value), kv), b = Tensor::of(t, rotary, rope),
           k(t, heads * (nope + rotary)), v(t, heads * value);
    run_op(OpKind::mla_keys, does, {&a, &b}, {&k, &v});
    return dot(k.values(), dk.values()) + dot(v.values(), dv.values());
  };
  Values want_kv, want_rope;
  for (size_t i = 0; i < static_cast<size_t>(dkv.size()); ++i) want_kv.push_back(transposed(i, false));
  for (size_t i = 0; i < static_cast<size_t>(dk_rope.size()); ++i) want_rope.push_back(transposed(i, true));
  expect_close(dkv, want_kv);
  expect_close(dk_rope, plus(want_rope, before));
}

}  // namespace
}  // namespace mop::cpu
