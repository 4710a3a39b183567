#include "exec/launch/tell.h"

#include <unistd.h>

namespace mop::launch {

void tell(const std::string& line) {
  const std::string text = "mop: " + line + "\n";
  [[maybe_unused]] const ssize_t ignored = write(STDERR_FILENO, text.data(), text.size());
}

}  // namespace mop::launch
