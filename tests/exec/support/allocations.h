// Counts what the whole process allocates between two points, on all threads: malloc and operator new alike.
// Link allocations.cpp into the test's executable.
#pragma once
#include <cstdint>

namespace mop::test {

class Allocations {
 public:
  // Sanitizers bring their own malloc: nothing is counted under them.
  static bool counted();
  Allocations();   // from here on
  ~Allocations();  // one at a time
  int64_t count() const;
};

// Of the calling thread, ever. Nothing is counted under sanitizers.
int64_t allocations_of_thread();

}  // namespace mop::test
