// Slower paths that a kernel takes where its fast one does not fit: said once each.
#pragma once
#include <functional>
#include <string>

namespace mop::kernels {

// Where warnings go; to nobody at first. Set it before the first launch.
void warn_of_fallbacks(std::function<void(const std::string&)> sink);

// Says that `path` is taken, once in the life of the process for equal texts. From any thread.
void fallback(const char* path);

}  // namespace mop::kernels
