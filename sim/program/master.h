// Where the fp32 master copy of a weight is, and how 16 bits beside its bf16 weight are as good as 32.
#pragma once
#include <cstdint>

namespace mop::program {

// states: among the optimizer states. weights: the weight itself is fp32. low: the bf16 weight is the master
// rounded to nearest, and the states have only its low 16 bits: as integers, master = weight x 2^16 + the low
// bits, signed. Nothing is lost, and 10 bytes of states a parameter travel and are kept instead of 12.
enum class Master : uint8_t { states, weights, low };

// Optimizer states of a parameter: [master |] m | v [| low bits].
constexpr int64_t state_bytes(Master master) {
  return master == Master::states ? 12 : master == Master::weights ? 8 : 10;
}

// DRAM bytes of one update of a parameter by the CPU. mop: 14 read, 14 written; fsdp2's fp32 weight, gradient
// and two moments: 16 read, 12 written.
inline constexpr int64_t kHostAdamTraffic = 28;

// A master exactly between two bf16 numbers could be rounded either way, and the low bits would not tell:
// wherever weights are bf16, it is moved by its last bit, toward zero.
constexpr uint32_t settled(uint32_t master) {
  return (master & 0xffff) == 0x8000 ? master - 1 : master;
}

constexpr bool is_nan(uint32_t bits) {
  return (bits & 0x7fffffff) > 0x7f800000;
}

// The bits of a settled master, apart and together again. Any NaN comes back as one.
constexpr uint16_t high_part(uint32_t master) {
  return static_cast<uint16_t>(is_nan(master) ? 0x7fff : (master + 0x8000) >> 16);
}
constexpr uint16_t low_part(uint32_t master) {
  return static_cast<uint16_t>(is_nan(master) ? 0 : master);
}
constexpr uint32_t whole(uint16_t high, uint16_t low) {
  return (static_cast<uint32_t>(high) << 16) +
         static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(low)));
}

}  // namespace mop::program
