// The two kinds of failure that the product knows.
#pragma once
#include <source_location>
#include <stdexcept>
#include <string>

namespace mop {

// The user gave something that cannot be used. The message is one line: what is wrong and what to do next.
// Commands end with exit status 2.
class UserError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The product is wrong: a broken invariant or a prediction that failed its own check. Exit status 1.
class InternalError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

// Throws InternalError naming the place when an invariant does not hold.
void ensure(bool holds, const char* invariant, std::source_location where = std::source_location::current());

}  // namespace mop
