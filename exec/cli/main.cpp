#include <malloc.h>

#include <array>

#include "exec/cli/calibrate.h"
#include "exec/cli/run.h"
#include "sim/cli/app.h"

int main(int argc, char** argv) {
  // Predictions allocate and free tens of megabytes each: giving them back to the kernel in between costs a
  // tenth of the time.
  mallopt(M_TRIM_THRESHOLD, 256 << 20);
  mallopt(M_MMAP_THRESHOLD, 256 << 20);
  constexpr std::array<mop::cli::AddCommand, 2> executor{mop::cli::add_run, mop::cli::add_calibrate};
  return mop::cli::run(argc, argv, executor);
}
