// What runs a program's operations for one rank: streams and events as CUDA has them. The interpreter only
// enqueues; the backend's streams run what they are given first in, first out, and side by side.
#pragma once
#include <cstdint>

#include "exec/interpreter/call.h"
#include "exec/interpreter/step.h"
#include "sim/base/error.h"

namespace mop::interpreter {

// One execution of one operation. The operands' memory, Step::data and the interpreter outlive it.
struct Launch {
  Call call;
  Step step;
  int64_t iteration = 0;  // of the operation's region (Region 0: the step), over all steps
  int64_t pass = 0;       // steps and flushes that this rank issued before
  int64_t issue = 0;      // launches that this rank issued before
};

// The device does not get on, and whatever waits for it would wait for ever.
class Stalled : public UserError {
 public:
  using UserError::UserError;
};

class Backend {
 public:
  virtual ~Backend() = default;
  // Events [0, events) exist from here on.
  virtual void reserve(uint32_t events) = 0;
  virtual void launch(program::Stream stream, const Launch& launch) = 0;
  virtual void record(program::Stream stream, uint32_t event) = 0;
  // What the stream is given from here on starts after the latest record of `event` issued so far; at once if
  // there is none.
  virtual void wait(program::Stream stream, uint32_t event) = 0;
  // Blocks the host until the latest record of `event`, behind a plan_routing operation, has completed;
  // returns the rounds, at least 1, that its output asks for.
  virtual int64_t rounds(uint32_t event, const Call& plan) = 0;
  // Blocks the host until everything issued has completed.
  virtual void synchronize() = 0;
};

}  // namespace mop::interpreter
