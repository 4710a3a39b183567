#include "kernels/fallback.h"

#include <mutex>
#include <set>
#include <utility>

namespace mop::kernels {
namespace {

std::mutex mutex;
std::set<std::string> said;
std::function<void(const std::string&)> to;

}  // namespace

void warn_of_fallbacks(std::function<void(const std::string&)> sink) {
  const std::lock_guard lock(mutex);
  to = std::move(sink);
}

void fallback(const char* path) {
  const std::lock_guard lock(mutex);
  if (to && said.insert(path).second) to(path);
}

}  // namespace mop::kernels
