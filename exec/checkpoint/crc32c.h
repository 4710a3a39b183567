// CRC-32C (Castagnoli), as iSCSI and file systems use it: RFC 3720, appendix B.4.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

namespace mop::checkpoint {

uint32_t crc32c(std::span<const std::byte> bytes);

}  // namespace mop::checkpoint
