// Which sets of ranks need an NCCL communicator, and on which stream: the executor makes these, the simulator
// counts what they take.
#pragma once
#include <functional>
#include <vector>

#include "sim/program/program.h"

namespace mop::program {

// Groups of the same ranks share a communicator, as their operations on one stream come in one order on every
// rank.
struct Meeting {
  Stream stream;
  plan::Span span;
  // What for: NCCL connects for each with its first operation.
  bool everyone = false;    // sends and receives among all of them
  bool neighbours = false;  // from each to the next alone
  bool collective = false;  // anything else
};

// Of a program that runs, in the same order on every rank. copied: whether NCCL is left out of an operation.
std::vector<Meeting> meetings(const StepProgram& program, const std::function<bool(const Op&)>& copied);

}  // namespace mop::program
