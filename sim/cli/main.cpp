#include "sim/cli/app.h"

int main(int argc, char** argv) {
  return mop::cli::run(argc, argv);
}
