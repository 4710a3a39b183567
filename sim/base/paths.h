// Where the shipped data lives: $MOP_HOME if set, else the source tree that this binary was built from.
#pragma once
#include <filesystem>

namespace mop {

std::filesystem::path data_home();

}  // namespace mop
