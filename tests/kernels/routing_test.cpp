#include "kernels/routing.h"

#include "tests/kernels/support.h"

namespace mop::kernels {
namespace {

struct Round {
  int64_t tokens, choices, rows = 0;
  std::vector<int32_t> order;  // a permutation of the copies
  std::vector<Flow> flows;
  std::vector<int32_t> copies;  // of each row
};

class Routing : public OnDevice {
 protected:
  // Disjoint pieces of a random order, in a random order.
  Round round(int64_t tokens, int64_t choices, int64_t pieces, bool all) {
    Round r{tokens, choices, 0, {}, {}, {}};
    r.order.resize(static_cast<size_t>(tokens * choices));
    std::iota(r.order.begin(), r.order.end(), 0);
    std::shuffle(r.order.begin(), r.order.end(), random);
    std::vector<int32_t> cuts{0, static_cast<int32_t>(r.order.size())};
    for (int64_t i = 1; i < pieces; ++i) cuts.push_back(static_cast<int32_t>(number(0, tokens * choices)));
    std::sort(cuts.begin(), cuts.end());
    std::vector<Flow> flows;
    for (size_t i = 0; i + 1 < cuts.size(); ++i) flows.push_back({cuts[i], cuts[i + 1] - cuts[i], 0});
    std::shuffle(flows.begin(), flows.end(), random);
    for (Flow& flow : flows) {
      if (!all && number(0, 2) == 0) continue;
      flow.at = static_cast<int32_t>(r.rows);
      r.flows.push_back(flow);
      for (int32_t i = 0; i < flow.rows; ++i)
        r.copies.push_back(r.order[static_cast<size_t>(flow.first_in_order + i)]);
      r.rows += flow.rows;
    }
    return r;
  }
  std::vector<Round> rounds() {
    return {round(40, 4, 10, false),
            round(40, 4, 1, true),
            round(700, 8, 2500, false),
            round(33, 1, 5, false),
            round(5, 32, 40, true),
            round(9, 40, 7, false),
            {20, 2, 0, std::vector<int32_t>(40), {}, {}},
            round(300, 8, 128, true)};
  }
  static SentRows sent(const Round& r, const DeviceVector<int32_t>& order) {
    return {r.flows.data(), static_cast<int64_t>(r.flows.size()), order.get(), r.choices};
  }
};

struct Shape {
  int64_t cols;
  Layout layout;
};
const std::vector<Shape> kShapes{{64, {}}, {2048, {}}, {33, {}}, {10, {2, 2}}, {264, {8, 0}}};

TEST_F(Routing, Permute) {
  for (const Type type : kTypes) {
    for (const Shape& s : kShapes) {
      for (const Round& r : rounds()) {
        SCOPED_TRACE(testing::Message() << name(type) << " " << r.rows << " rows of " << r.tokens << " x "
                                        << r.choices << ", " << s.cols << " columns");
        const int64_t capacity = r.rows + 3;
        const Values x = random_values(r.tokens * s.cols, type, random),
                     dy = random_values(r.tokens * s.cols, type, random),
                     weights = random_values(r.tokens * r.choices, Type::f32, random);
        Values to_x(static_cast<size_t>(capacity * s.cols), DeviceArray::kPoison),
            to_dy = to_x, to_weights(static_cast<size_t>(capacity), DeviceArray::kPoison);
        for (size_t row = 0; row < r.copies.size(); ++row) {
          const int64_t token = r.copies[row] / r.choices;
          std::copy_n(x.begin() + token * s.cols, s.cols, to_x.begin() + static_cast<int64_t>(row) * s.cols);
          std::copy_n(dy.begin() + token * s.cols, s.cols,
                      to_dy.begin() + static_cast<int64_t>(row) * s.cols);
          to_weights[row] = weights[static_cast<size_t>(r.copies[row])];
        }
        const DeviceVector<int32_t> order(r.order);
        const DeviceMatrix d_x(x, r.tokens, s.cols, type, s.layout),
            d_dy(dy, r.tokens, s.cols, type, s.layout);
        const DeviceMatrix d_to_x = DeviceMatrix::poisoned(capacity, s.cols, type, s.layout),
                           d_to_dy = DeviceMatrix::poisoned(capacity, s.cols, type, s.layout);
        const auto d_weights = device_floats(weights),
                   d_to_weights = device_floats(Values(to_weights.size(), DeviceArray::kPoison));
        permute({sent(r, order), d_x, d_dy, d_weights.get(), d_to_x, d_to_dy, d_to_weights.get()}, nullptr);
        EXPECT_EQ(d_to_x.values(), to_x);
        EXPECT_EQ(d_to_dy.values(), to_dy);
        EXPECT_EQ(as_values(d_to_weights.values()), to_weights);

        const DeviceMatrix alone = DeviceMatrix::poisoned(capacity, s.cols, type, s.layout);
        permute({sent(r, order), d_x, {}, nullptr, alone, {}, nullptr}, nullptr);
        EXPECT_EQ(alone.values(), to_x);
      }
    }
  }
}

TEST_F(Routing, Unpermute) {
  for (const Type type : kTypes) {
    for (const Shape& s : kShapes) {
      for (const Round& r : rounds()) {
        SCOPED_TRACE(testing::Message() << name(type) << " " << r.rows << " rows of " << r.tokens << " x "
                                        << r.choices << ", " << s.cols << " columns");
        const int64_t capacity = r.rows + 3;
        const Values rows = random_values(capacity * s.cols, type, random),
                     weights = random_values(r.tokens * r.choices, Type::f32, random),
                     row_d_weights = random_values(capacity, Type::f32, random),
                     before = random_values(r.tokens * s.cols, Type::f32, random);
        Values y = before, dx = before, d_weights(weights.size(), DeviceArray::kPoison);
        for (size_t row = 0; row < r.copies.size(); ++row) {
          const auto copy = static_cast<size_t>(r.copies[row]);
          for (int64_t c = 0; c < s.cols; ++c) {
            const auto to = static_cast<size_t>(r.copies[row] / r.choices * s.cols + c);
            const double value = rows[row * static_cast<size_t>(s.cols) + static_cast<size_t>(c)];
            y[to] += weights[copy] * value;
            dx[to] += value;
          }
          d_weights[copy] = row_d_weights[row];
        }
        const DeviceVector<int32_t> order(r.order);
        const DeviceMatrix d_rows(rows, capacity, s.cols, type, s.layout),
            d_y(before, r.tokens, s.cols, Type::f32, s.layout),
            d_dx(before, r.tokens, s.cols, Type::f32, s.layout);
        const auto d_weights_in = device_floats(weights), d_row_weights = device_floats(row_d_weights),
                   d_weights_out = device_floats(Values(weights.size(), DeviceArray::kPoison));
        const Scratch scratch(unpermute_scratch(r.tokens, r.choices));
        unpermute({sent(r, order), d_rows, d_weights_in.get(), d_y, scratch.get<int32_t>()}, nullptr);
        expect_close(d_y.values(), y, 2e-5, "y");
        unpermute_bwd(
            {sent(r, order), d_rows, d_row_weights.get(), d_dx, d_weights_out.get(), scratch.get<int32_t>()},
            nullptr);
        expect_close(d_dx.values(), dx, 2e-5, "dx");
        EXPECT_EQ(as_values(d_weights_out.values()), d_weights);
      }
    }
  }
}

TEST_F(Routing, RefusesFlowsWithGaps) {
  const Flow flows[] = {{0, 2, 0}, {4, 2, 3}};
  const DeviceVector<int32_t> order(std::vector<int32_t>(8));
  const DeviceMatrix x = DeviceMatrix::poisoned(8, 8, Type::f32);
  EXPECT_THROW(permute({{flows, 2, order.get(), 1}, x, {}, nullptr, x, {}, nullptr}, nullptr),
               std::invalid_argument);
}

}  // namespace
}  // namespace mop::kernels
