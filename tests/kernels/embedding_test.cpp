#include "kernels/embedding.h"

#include <limits>

#include "tests/kernels/support.h"

namespace mop::kernels {
namespace {

class Embedding : public OnDevice {
 protected:
  enum class Pattern { random, one_token, few, distinct };
  std::vector<int32_t> ids(int64_t n, int64_t vocabulary, Pattern pattern) {
    std::vector<int32_t> out(static_cast<size_t>(n));
    for (size_t i = 0; i < out.size(); ++i)
      out[i] = static_cast<int32_t>(pattern == Pattern::random      ? number(0, vocabulary - 1)
                                    : pattern == Pattern::one_token ? vocabulary - 1
                                    : pattern == Pattern::few       ? number(0, 2)
                                                                    : static_cast<int64_t>(i) % vocabulary);
    return out;
  }
};

TEST_F(Embedding, LooksUpAndReports) {
  for (const Type type : kTypes) {
    for (const auto& [cols, layout] :
         std::vector<std::pair<int64_t, Layout>>{{256, {}}, {33, {1, 1}}, {8, {8, 0}}}) {
      const int64_t vocabulary = 50, rows = 53, n = 300;
      const Values table = random_values(rows * cols, type, random);
      std::vector<int32_t> tokens = ids(n, vocabulary, Pattern::random);
      tokens[200] = 50, tokens[250] = -1;
      Values x;
      for (const int32_t id : tokens)
        for (int64_t c = 0; c < cols; ++c)
          x.push_back(id < 0 || id >= vocabulary ? 0 : table[static_cast<size_t>(id * cols + c)]);
      const DeviceVector<int32_t> d_ids(tokens), invalid({std::numeric_limits<int32_t>::max()});
      const DeviceMatrix d_table(table, rows, cols, type, layout),
          d_x = DeviceMatrix::poisoned(n, cols, type, layout);
      embedding({d_ids.get(), vocabulary, d_table, d_x, invalid.get()}, nullptr);
      EXPECT_EQ(d_x.values(), x);
      EXPECT_EQ(invalid.values()[0], 200);
    }
  }
}

TEST_F(Embedding, Backward) {
  const std::vector<std::array<Type, 2>> types{
      {Type::bf16, Type::bf16}, {Type::bf16, Type::f32}, {Type::f32, Type::f32}};  // dx, table
  for (const auto& [type, table_type] : types) {
    for (const auto& [cols, layout] :
         std::vector<std::pair<int64_t, Layout>>{{2304, {}}, {33, {1, 1}}, {64, {8, 0}}}) {
      for (const Pattern pattern : {Pattern::random, Pattern::one_token, Pattern::few, Pattern::distinct}) {
        for (const int64_t n : {0, 1, 32, 33, 500, 5000}) {
          if (n > 500 && cols > 64) continue;
          const bool accumulate = n % 2 == 0;
          SCOPED_TRACE(testing::Message()
                       << name(type) << " into " << name(table_type) << ", " << n << " tokens, " << cols
                       << " columns, pattern " << static_cast<int>(pattern));
          const int64_t vocabulary = n > 500 ? 3000 : 70;  // sorted in one class, or in several
          const std::vector<int32_t> tokens = ids(n, vocabulary, pattern);
          const Values dx = random_values(n * cols, type, random),
                       before = random_values(vocabulary * cols, table_type, random);
          Values table = accumulate ? before : Values(before.size());
          for (int64_t t = 0; t < n; ++t)
            for (int64_t c = 0; c < cols; ++c)
              table[static_cast<size_t>(tokens[static_cast<size_t>(t)] * cols + c)] +=
                  dx[static_cast<size_t>(t * cols + c)];
          const DeviceVector<int32_t> d_ids(tokens);
          const DeviceMatrix d_dx(dx, n, cols, type, layout),
              d_table(before, vocabulary, cols, table_type, layout);
          const Scratch scratch(embedding_bwd_scratch(n, cols));
          embedding_bwd({d_ids.get(), d_dx, d_table, accumulate, scratch.get<void>()}, nullptr);
          expect_close(d_table.values(), table, tolerance(table_type), "d_table");
        }
      }
    }
  }
}

}  // namespace
}  // namespace mop::kernels
