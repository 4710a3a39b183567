#include "kernels/rope.h"

#include "kernels/norm.h"
#include "tests/kernels/support.h"

namespace mop::kernels {
namespace {

constexpr double kEps = 1e-5;
constexpr int64_t kPositions = 64;

struct Shape {
  int64_t rows, tokens, heads, width, first, rotated;
  int64_t norm;  // columns, 0: none
  Layout layout;
};
const std::vector<Shape> kShapes{{50, 50, 4, 128, 0, 128, 128, {}},     {50, 25, 3, 64, 0, 64, 0, {64, 0}},
                                 {40, 40, 16, 128, 0, 128, 2048, {}},   {30, 30, 2, 192, 128, 64, 0, {}},
                                 {30, 30, 4, 128, 0, 64, 128, {}},      {21, 7, 3, 10, 2, 6, 10, {1, 3}},
                                 {21, 7, 3, 10, 2, 6, 30, {}},          {9, 9, 1, 64, 0, 64, 0, {512, 0}},
                                 {2000, 500, 2, 16, 0, 16, 16, {}},     {0, 0, 2, 16, 0, 16, 16, {}},
                                 {1420, 710, 25, 128, 0, 128, 128, {}}, {33, 11, 8, 64, 0, 64, 256, {64, 0}},
                                 {20, 20, 64, 128, 0, 128, 4096, {}},   {12, 12, 64, 128, 0, 128, 8192, {}},
                                 {300, 300, 8, 16, 0, 16, 32, {}}};

class Rope : public OnDevice {
 protected:
  struct Tables {
    Values cos, sin;
    Tables(int64_t rotated, std::mt19937& random)
        : cos(random_values(kPositions * rotated / 2, Type::f32, random)),
          sin(random_values(kPositions * rotated / 2, Type::f32, random)) {}
  };
  std::vector<int32_t> positions(int64_t tokens) {
    std::vector<int32_t> out(static_cast<size_t>(tokens));
    for (int32_t& p : out) p = static_cast<int32_t>(number(0, kPositions - 1));
    return out;
  }
  // Pair i of a head: indices of its two elements.
  static std::pair<int64_t, int64_t> pair(const Shape& s, bool interleaved, int64_t head, int64_t i) {
    const int64_t at = head * s.width + s.first;
    return interleaved ? std::pair{at + 2 * i, at + 2 * i + 1} : std::pair{at + i, at + i + s.rotated / 2};
  }
  static void rotate(Values& x, const Shape& s, bool interleaved, const Tables& t,
                     const std::vector<int32_t>& at, double direction) {
    for (int64_t r = 0; r < s.rows; ++r) {
      for (int64_t h = 0; h < s.heads; ++h) {
        for (int64_t i = 0; i < s.rotated / 2; ++i) {
          const auto [a, b] = pair(s, interleaved, h, i);
          const auto entry = static_cast<size_t>(at[static_cast<size_t>(r % s.tokens)] * (s.rotated / 2) + i);
          double &first = x[static_cast<size_t>(r * s.heads * s.width + a)],
                 &second = x[static_cast<size_t>(r * s.heads * s.width + b)];
          const double c = t.cos[entry], sine = direction * t.sin[entry], was = first;
          first = was * c - second * sine;
          second = second * c + was * sine;
        }
      }
    }
  }
  void check_backward(const Shape& s, Type type, bool interleaved) {
    SCOPED_TRACE(testing::Message() << name(type) << " " << s.rows << " rows, heads of " << s.width
                                    << ", norm of " << s.norm << (interleaved ? ", interleaved" : ""));
    const int64_t cols = s.heads * s.width;
    const Tables tables(s.rotated, random);
    const std::vector<int32_t> at = positions(s.tokens);
    const Values x = random_values(s.rows * cols, type, random), w = random_values(s.norm, type, random),
                 dy = random_values(s.rows * cols, type, random),
                 before = random_values(s.norm, Type::f32, random);
    Values dx = dy, dw = before;
    rotate(dx, s, interleaved, tables, at, -1);
    if (s.norm > 0) through_rms_norm(dx, dw, x, w, kEps);
    const auto cos = device_floats(tables.cos), sin = device_floats(tables.sin);
    const DeviceVector<int32_t> d_at(at);
    const DeviceMatrix d_x(x, s.rows, cols, type, s.layout), d_w(w, 1, s.norm, type),
        d_dy(dy, s.rows, cols, type, s.layout), d_dw(before, 1, s.norm, Type::f32);
    const Scratch scratch(s.norm > 0 ? rms_norm_bwd_scratch(s.rows, cols, s.norm) : 0);
    RopeBwdArgs args{d_dy,
                     {},
                     {},
                     d_dy,
                     {},
                     d_at.get(),
                     s.tokens,
                     {s.width, s.first, s.rotated, interleaved, cos.get(), sin.get()},
                     static_cast<float>(kEps),
                     true,
                     scratch.get<float>()};
    if (s.norm > 0) args.x = d_x, args.w = d_w, args.dw = d_dw;
    rope_bwd(args, nullptr);
    expect_close(d_dy.values(), dx, tolerance(type), "dx");
    expect_close(d_dw.values(), dw, tolerance(Type::f32), "dw");
  }
};

TEST_F(Rope, Forward) {
  for (const Type type : kTypes) {
    for (const Shape& s : kShapes) {
      for (const bool interleaved : {false, true}) {
        SCOPED_TRACE(testing::Message() << name(type) << " " << s.rows << " rows, heads of " << s.width
                                        << ", norm of " << s.norm << (interleaved ? ", interleaved" : ""));
        const int64_t cols = s.heads * s.width;
        const Tables tables(s.rotated, random);
        const std::vector<int32_t> at = positions(s.tokens);
        const Values x = random_values(s.rows * cols, type, random), w = random_values(s.norm, type, random);
        Values y = x;
        for (size_t first = 0; s.norm > 0 && first < x.size(); first += w.size()) {
          double squares = 0;
          for (size_t i = 0; i < w.size(); ++i) squares += x[first + i] * x[first + i];
          for (size_t i = 0; i < w.size(); ++i)
            y[first + i] = w[i] * x[first + i] / std::sqrt(squares / static_cast<double>(s.norm) + kEps);
        }
        rotate(y, s, interleaved, tables, at, 1);
        const auto cos = device_floats(tables.cos), sin = device_floats(tables.sin);
        const DeviceVector<int32_t> d_at(at);
        const DeviceMatrix d_x(x, s.rows, cols, type, s.layout), d_w(w, 1, s.norm, type);
        RopeArgs args{d_x,
                      {},
                      d_x,
                      d_at.get(),
                      s.tokens,
                      {s.width, s.first, s.rotated, interleaved, cos.get(), sin.get()},
                      static_cast<float>(kEps)};
        if (s.norm > 0) args.w = d_w;
        rope(args, nullptr);  // in place
        expect_close(d_x.values(), y, tolerance(type), "y");
      }
    }
  }
}

TEST_F(Rope, Backward) {
  for (const Type type : kTypes)
    for (const Shape& s : kShapes)
      for (const bool interleaved : {false, true}) check_backward(s, type, interleaved);
}

// Of several heads, as OLMoE's: from fewer norms than the grid has blocks to three rounds of it.
TEST_F(Rope, BackwardOfNormsOfHeads) {
  for (const int64_t heads : {2, 8, 16, 32}) {
    for (const int64_t most : {int64_t{3}, int64_t{300}, 6'000'000 / (heads * 128)}) {
      const int64_t norms = number(1, 2), sequences = number(1, 3);  // norms of a row
      const int64_t tokens = (most - number(0, most / 3)) / (norms * sequences) + 1;
      check_backward(
          {sequences * tokens, tokens, norms * heads, 128, 0, 128, heads * 128, {8 * number(0, 1), 0}},
          Type::bf16, false);
    }
  }
}

struct KeysShape {
  int64_t rows, heads, nope, value, rotary;
  Layout layout;
};
const std::vector<KeysShape> kKeys{{20, 8, 128, 128, 64, {}},
                                   {7, 3, 5, 7, 6, {}},
                                   {9, 2, 16, 24, 8, {8, 8}},
                                   {0, 2, 16, 24, 8, {}},
                                   {3, 40, 32, 32, 256, {}}};

TEST_F(Rope, LatentKeys) {
  for (const Type type : kTypes) {
    for (const KeysShape& s : kKeys) {
      SCOPED_TRACE(testing::Message() << name(type) << " " << s.heads << " heads of " << s.nope);
      const int64_t all = s.nope + s.value, key = s.nope + s.rotary;
      const Values kv = random_values(s.rows * s.heads * all, type, random),
                   k_rope = random_values(s.rows * s.rotary, type, random);
      Values k, v;
      for (int64_t r = 0; r < s.rows; ++r) {
        for (int64_t h = 0; h < s.heads; ++h) {
          const auto from = kv.begin() + (r * s.heads + h) * all;
          k.insert(k.end(), from, from + s.nope);
          k.insert(k.end(), k_rope.begin() + r * s.rotary, k_rope.begin() + (r + 1) * s.rotary);
          v.insert(v.end(), from + s.nope, from + all);
        }
      }
      const DeviceMatrix d_kv(kv, s.rows, s.heads * all, type, s.layout),
          d_rope(k_rope, s.rows, s.rotary, type, s.layout);
      const DeviceMatrix d_k = DeviceMatrix::poisoned(s.rows, s.heads * key, type, s.layout),
                         d_v = DeviceMatrix::poisoned(s.rows, s.heads * s.value, type, s.layout);
      mla_keys({d_kv, d_rope, d_k, d_v, s.nope, s.value, s.rotary}, nullptr);
      EXPECT_EQ(d_k.values(), k);
      EXPECT_EQ(d_v.values(), v);
    }
  }
}

TEST_F(Rope, LatentKeysBackward) {
  for (const Type type : kTypes) {
    for (const KeysShape& s : kKeys) {
      for (const bool accumulate : {false, true}) {
        SCOPED_TRACE(testing::Message() << name(type) << " " << s.heads << " heads of " << s.nope);
        const int64_t all = s.nope + s.value, key = s.nope + s.rotary;
        const Values dk = random_values(s.rows * s.heads * key, type, random),
                     dv = random_values(s.rows * s.heads * s.value, type, random),
                     before = random_values(s.rows * s.rotary, type, random);
        Values dkv, d_rope = accumulate ? before : Values(before.size());
        for (int64_t r = 0; r < s.rows; ++r) {
          for (int64_t h = 0; h < s.heads; ++h) {
            const auto from = dk.begin() + (r * s.heads + h) * key,
                       value = dv.begin() + (r * s.heads + h) * s.value;
            dkv.insert(dkv.end(), from, from + s.nope);
            dkv.insert(dkv.end(), value, value + s.value);
            for (int64_t i = 0; i < s.rotary; ++i)
              d_rope[static_cast<size_t>(r * s.rotary + i)] += *(from + s.nope + i);
          }
        }
        const DeviceMatrix d_k(dk, s.rows, s.heads * key, type, s.layout),
            d_v(dv, s.rows, s.heads * s.value, type, s.layout), d_r(before, s.rows, s.rotary, type, s.layout);
        const DeviceMatrix d_kv = DeviceMatrix::poisoned(s.rows, s.heads * all, type, s.layout);
        mla_keys_bwd({d_k, d_v, d_kv, d_r, s.nope, s.value, s.rotary, accumulate}, nullptr);
        EXPECT_EQ(d_kv.values(), dkv);
        expect_close(d_r.values(), d_rope, tolerance(type), "dk_rope");
      }
    }
  }
}

}  // namespace
}  // namespace mop::kernels
