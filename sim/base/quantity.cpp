#include "sim/base/quantity.h"

#include <fmt/format.h>

#include <array>
#include <charconv>
#include <cmath>
#include <limits>

#include "sim/base/error.h"

namespace mop {
namespace {

struct Unit {
  std::string_view suffix;
  double factor;
};

constexpr double kKi = 1024.0, kMi = kKi * 1024, kGi = kMi * 1024, kTi = kGi * 1024;

constexpr std::array kCountUnits{Unit{"", 1}, Unit{"K", kKi}, Unit{"M", kMi}, Unit{"G", kGi}};
constexpr std::array kByteUnits{Unit{"", 1},      Unit{"B", 1},     Unit{"KiB", kKi}, Unit{"MiB", kMi},
                                Unit{"GiB", kGi}, Unit{"TiB", kTi}, Unit{"KB", 1e3},  Unit{"MB", 1e6},
                                Unit{"GB", 1e9},  Unit{"TB", 1e12}};

template <size_t N>
int64_t parse(std::string_view text, std::string_view what, const std::array<Unit, N>& units,
              const char* examples) {
  double number = 0;
  const auto [end, status] = std::from_chars(text.data(), text.data() + text.size(), number);
  const std::string_view suffix =
      status == std::errc() ? text.substr(static_cast<size_t>(end - text.data())) : std::string_view();
  if (status == std::errc() && std::isfinite(number)) {
    for (const Unit& unit : units) {
      if (unit.suffix != suffix) continue;
      const double value = number * unit.factor;
      if (value <= 0) throw UserError(fmt::format("{} is '{}': it must be greater than zero", what, text));
      if (value >= 9.2e18)
        throw UserError(fmt::format("{} is '{}': too large, the limit is 2^63", what, text));
      if (value != std::floor(value))
        throw UserError(fmt::format("{} is '{}': it must be a whole number", what, text));
      return static_cast<int64_t>(value);
    }
  }
  if (status == std::errc::result_out_of_range)
    throw UserError(fmt::format("{} is '{}': too large, the limit is 2^63", what, text));
  throw UserError(fmt::format("{} is '{}': not a size; write it like {}", what, text, examples));
}

}  // namespace

int64_t parse_count(std::string_view text, std::string_view what) {
  return parse(text, what, kCountUnits, "4096, 128K or 1M");
}

int64_t parse_bytes(std::string_view text, std::string_view what) {
  return parse(text, what, kByteUnits, "4096, 512MiB or 16GiB");
}

std::string format_bytes(double bytes) {
  const double magnitude = std::fabs(bytes);
  if (magnitude >= kTi) return fmt::format("{:.2f} TiB", bytes / kTi);
  if (magnitude >= kGi) return fmt::format("{:.1f} GiB", bytes / kGi);
  if (magnitude >= kMi) return fmt::format("{:.1f} MiB", bytes / kMi);
  if (magnitude >= kKi) return fmt::format("{:.1f} KiB", bytes / kKi);
  return fmt::format("{:.0f} B", bytes);
}

std::string format_count(int64_t count) {
  if (count > 0 && count % (1 << 20) == 0) return fmt::format("{}M", count >> 20);
  if (count > 0 && count % (1 << 10) == 0) return fmt::format("{}K", count >> 10);
  return fmt::format("{}", count);
}

std::string format_seconds(double seconds) {
  const double magnitude = std::fabs(seconds);
  if (magnitude >= 100) return fmt::format("{:.1f} s", seconds);
  if (magnitude >= 1) return fmt::format("{:.2f} s", seconds);
  if (magnitude >= 1e-3) return fmt::format("{:.2f} ms", seconds * 1e3);
  return fmt::format("{:.2f} us", seconds * 1e6);
}

}  // namespace mop
