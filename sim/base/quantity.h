// Sizes, counts and durations as people write and read them. K, M, G are powers of 1024 for tokens and
// bytes ("128K" = 131072, "16GiB" = 17179869184, "16GB" = 16e9); text made here always carries its unit.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace mop {

// "4096", "128K", "1M" -> tokens or another count. Errors: UserError naming `what` for empty, signed,
// fractional, zero, negative or overflowing text.
int64_t parse_count(std::string_view text, std::string_view what);

// "16GiB", "16GB", "1TB", "1.5TiB", "4096" -> bytes. Errors as parse_count.
int64_t parse_bytes(std::string_view text, std::string_view what);

std::string format_bytes(double bytes);      // "119.0 GiB"
std::string format_count(int64_t count);     // "128K" when exact, else "131000"
std::string format_seconds(double seconds);  // "3.17 s", "12.4 ms"

}  // namespace mop
