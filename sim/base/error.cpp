#include "sim/base/error.h"

#include <fmt/format.h>

namespace mop {

void ensure(bool holds, const char* invariant, std::source_location where) {
  if (holds) return;
  throw InternalError(fmt::format("{}:{}: invariant broken: {}", where.file_name(), where.line(), invariant));
}

}  // namespace mop
