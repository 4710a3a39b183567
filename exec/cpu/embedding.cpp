#include <fmt/core.h>

#include <algorithm>

#include "exec/cpu/operations.h"
#include "exec/cpu/tensor.h"

namespace mop::cpu {

void embedding(const Call& call, const Constants& constants) {
  const std::span<const int32_t> ids = integers(required(call.in, 0));
  const Operand &table = required(call.in, 1), &x = required(call.out, 0);
  const int64_t vocab = constants.model.vocab;
  ensure(rows(table) >= vocab && rows(x) == std::ssize(ids) && x.view.cols == table.view.cols,
         "every token has a row of the table");
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab) {
      throw UserError(
          fmt::format("token {} at position {} is beyond the vocabulary of {}: tokenize the data "
                      "with the tokenizer of this model",
                      ids[i], i, vocab));
    }
    convert(row(table, ids[i]), row(x, static_cast<int64_t>(i)));
  }
}

void embedding_bwd(const Call& call, Workspace& workspace) {
  const std::span<const int32_t> ids = integers(required(call.in, 0));
  const Operand &dx = required(call.in, 1), &d_table = required(call.out, 0);
  ensure(rows(dx) == std::ssize(ids) && dx.view.cols == d_table.view.cols, "every token has a gradient");
  if (!call.op->does.accumulate)
    for (int64_t r = 0; r < rows(d_table); ++r) clear(row(d_table, r));
  // A token's rows are added up before they are rounded to the table's type.
  const std::span<int32_t> order = workspace.take<int32_t>(std::ssize(ids));
  const std::span<float> sum = workspace.take<float>(dx.view.cols),
                         part = workspace.take<float>(dx.view.cols);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  const auto id = [&](size_t i) { return ids[static_cast<size_t>(order[i])]; };
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const int32_t first = ids[static_cast<size_t>(a)], second = ids[static_cast<size_t>(b)];
    return first != second ? first < second : a < b;
  });
  for (size_t i = 0; i < order.size();) {
    const int32_t token = id(i);
    ensure(token >= 0 && token < rows(d_table), "forward has checked the tokens");
    std::fill(sum.begin(), sum.end(), 0.0F);
    for (; i < order.size() && id(i) == token; ++i) {
      load(row(dx, order[i]), part.data());
      for (size_t c = 0; c < sum.size(); ++c) sum[c] += part[c];
    }
    add(sum.data(), row(d_table, token));
  }
}

}  // namespace mop::cpu
