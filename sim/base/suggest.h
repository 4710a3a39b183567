// The nearest known name, for errors that say what to type instead.
#pragma once
#include <span>
#include <string>
#include <string_view>

namespace mop {

// "unknown <what> '<name>'; did you mean 'x'? known: x, y, z" as a UserError message.
std::string unknown_name(std::string_view what, std::string_view name, std::span<const std::string> known);

}  // namespace mop
