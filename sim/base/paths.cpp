#include "sim/base/paths.h"

#include <cstdlib>

namespace mop {

std::filesystem::path data_home() {
  if (const char* home = std::getenv("MOP_HOME"); home != nullptr && *home != '\0') return home;
  return MOP_DATA_DIR;
}

}  // namespace mop
