// How fast the host's memory is while a run is there. Others on the host use it, too: within a minute AdamW
// alone went at 120 and at 195 GB/s, some seconds each, and a calibration of one minute is not what the next
// one has (reports/measurements/h200x2/adam_over_time.txt).
#pragma once
#include <cstdint>

#include "exec/host/rates.h"
#include "exec/interpreter/memory.h"
#include "exec/launch/peers.h"
#include "sim/program/program.h"

namespace mop::cuda {

// Takes what is pinned up to the GPU and down again, and reads and writes back optimizer states where the CPU
// updates them, as AdamW goes through them, for most of a second each: host memory stays as it is.
// Collective; nothing else of the run may be under way. Buffers of HBM that do not outlive a step are
// overwritten. Nothing is measured of less than `least` bytes, as caches would answer.
host::Rates probe_host(const program::StepProgram& program, const interpreter::Memory& memory,
                       int64_t host_bytes, launch::Peers& peers, int64_t least = int64_t{1} << 30);

}  // namespace mop::cuda
