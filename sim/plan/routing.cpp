#include "sim/plan/routing.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>

#include "sim/base/error.h"
#include "sim/base/suggest.h"

namespace mop::plan {
namespace {

using Row = std::vector<int64_t>;

constexpr const char* kForms = "write balanced, zipf:1.2, hot:0.3@4 or histogram:FILE";
const std::vector<std::string> kKinds = {"balanced", "zipf", "hot", "histogram"};  // in the order of Kind

constexpr int64_t kMaxCount = int64_t{1} << 53;  // of a histogram: keeps 128-bit products exact
constexpr std::streamsize kMaxFile = 64 << 20;   // bytes; 61 layers x 384 experts are below 1 MiB
constexpr double kWeightOne = 4294967296.0;      // weights are integers in units of 2^-32

// SplitMix64 (Steele, Lea, Flood 2014): a counter and a mixing function, the same on every machine.
class SplitMix64 {
 public:
  explicit SplitMix64(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  // 0 to bound - 1, by the high half of a product; the bias is below bound / 2^64.
  uint64_t below(uint64_t bound) {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(next()) * bound) >> 64);
  }

 private:
  uint64_t state_;
};

// Fisher-Yates: a permutation of 0 to n - 1.
std::vector<int> permutation(int n, uint64_t seed, int layer, int group) {
  SplitMix64 random(SplitMix64(SplitMix64(seed).next() + static_cast<uint64_t>(layer)).next() +
                    static_cast<uint64_t>(group));
  std::vector<int> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  for (int i = n - 1; i > 0; --i) std::swap(order[i], order[random.below(static_cast<uint64_t>(i) + 1)]);
  return order;
}

template <typename Number>
std::optional<Number> number(std::string_view text) {
  Number value{};
  const auto [end, status] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (status != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::string_view trimmed(std::string_view text) {
  const size_t first = text.find_first_not_of(" \t\r");
  return first == std::string_view::npos ? std::string_view()
                                         : text.substr(first, text.find_last_not_of(" \t\r") - first + 1);
}

// ---- histogram files

[[noreturn]] void fail_file(const std::string& file, const std::string& why) {
  throw UserError(
      fmt::format("histogram '{}': {}; give the token copies of each expert, as JSON [12, 7, ...] or CSV "
                  "12,7,..., one row or one "
                  "a routed layer",
                  file, why));
}

std::string read_text(const std::string& file) {
  std::error_code error;
  if (!std::filesystem::exists(file, error)) fail_file(file, "no such file");
  if (!std::filesystem::is_regular_file(file, error)) fail_file(file, "not a regular file");
  std::ifstream stream(file, std::ios::binary | std::ios::ate);
  if (!stream) fail_file(file, "it cannot be read");
  const std::streamsize size = stream.tellg();
  if (size > kMaxFile) fail_file(file, "larger than 64 MiB");
  std::string text(static_cast<size_t>(size), '\0');
  stream.seekg(0).read(text.data(), size);
  if (!stream) fail_file(file, "it cannot be read");
  return text;
}

// Throws unless `count` can be one; row and column count from 1.
int64_t checked(int64_t count, const std::string& file, size_t row, size_t column) {
  if (count < 0) fail_file(file, fmt::format("row {}, expert {} is negative ({})", row, column - 1, count));
  if (count > kMaxCount) fail_file(file, fmt::format("row {}, expert {} is above 2^53", row, column - 1));
  return count;
}

std::vector<Row> parse_json(const std::string& text, const std::string& file) {
  const nlohmann::json json = nlohmann::json::parse(text, nullptr, false);
  if (json.is_discarded()) fail_file(file, "not valid JSON");
  if (!json.is_array() || json.empty()) fail_file(file, "not a JSON array of counts");
  std::vector<Row> rows;
  const auto add = [&](const nlohmann::json& array) {
    Row& row = rows.emplace_back();
    if (!array.is_array()) fail_file(file, fmt::format("row {} is not an array of counts", rows.size()));
    for (const nlohmann::json& entry : array) {
      if (!entry.is_number_integer())
        fail_file(file, fmt::format("row {}, expert {} is not a whole number", rows.size(), row.size()));
      const bool huge =
          entry.is_number_unsigned() && entry.get<uint64_t>() > static_cast<uint64_t>(kMaxCount);
      row.push_back(checked(huge ? kMaxCount + 1 : entry.get<int64_t>(), file, rows.size(), row.size() + 1));
    }
  };
  if (json.front().is_array())
    for (const nlohmann::json& array : json) add(array);
  else
    add(json);
  return rows;
}

std::vector<Row> parse_csv(std::string_view text, const std::string& file) {
  std::vector<Row> rows;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = trimmed(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
    if (line.empty() || line.front() == '#') continue;
    Row& row = rows.emplace_back();
    for (bool more = true; more;) {
      const size_t comma = line.find(',');
      const std::optional<int64_t> count = number<int64_t>(trimmed(line.substr(0, comma)));
      if (!count)
        fail_file(file, fmt::format("row {}, expert {} is not a whole number", rows.size(), row.size()));
      row.push_back(checked(*count, file, rows.size(), row.size() + 1));
      more = comma != std::string_view::npos;
      if (more) line.remove_prefix(comma + 1);
    }
  }
  return rows;
}

std::vector<Row> read_histogram(const std::string& file) {
  const std::string text = read_text(file);
  const size_t first = text.find_first_not_of(" \t\r\n");
  if (first == std::string::npos) fail_file(file, "it is empty");
  const bool json = text[first] == '[' || text[first] == '{';
  std::vector<Row> rows = json ? parse_json(text, file) : parse_csv(text, file);
  if (rows.empty()) fail_file(file, "it has no counts");
  for (size_t r = 0; r < rows.size(); ++r) {
    if (rows[r].size() != rows[0].size())
      fail_file(file,
                fmt::format("row {} has {} counts, row 1 has {}", r + 1, rows[r].size(), rows[0].size()));
    if (std::ranges::all_of(rows[r], [](int64_t count) { return count == 0; }))
      fail_file(file, fmt::format("row {} has no copies at all", r + 1));
  }
  return rows;
}

// ---- drawing

// Popularity, falling, and the expert at each place of it.
struct Popularity {
  Row weights;
  std::vector<int> expert;
};

Popularity popularity(const Routing& routing, int experts, int layer, int group) {
  Popularity result;
  result.weights.resize(static_cast<size_t>(experts));
  if (routing.kind == Routing::Kind::histogram) {
    if (routing.counts.empty()) throw InternalError("a histogram routing without counts");
    if (routing.counts[0].size() != static_cast<size_t>(experts))
      fail_file(routing.file,
                fmt::format("it counts {} experts, the model has {}", routing.counts[0].size(), experts));
    if (routing.counts.size() > 1 && static_cast<size_t>(layer) >= routing.counts.size())
      fail_file(routing.file, fmt::format("it has {} rows, but there is a routed layer {} (from 0)",
                                          routing.counts.size(), layer));
    const Row& counts = routing.counts[routing.counts.size() > 1 ? static_cast<size_t>(layer) : 0];
    result.expert.resize(counts.size());
    std::iota(result.expert.begin(), result.expert.end(), 0);
    std::ranges::stable_sort(result.expert, [&](int a, int b) { return counts[a] > counts[b]; });
    std::ranges::transform(result.expert, result.weights.begin(), [&](int e) { return counts[e]; });
    return result;
  }
  result.expert = permutation(experts, routing.seed, layer, group);
  if (routing.kind == Routing::Kind::zipf) {
    for (int i = 0; i < experts; ++i)
      result.weights[i] = std::max<int64_t>(1, std::llround(kWeightOne * std::pow(i + 1, -routing.exponent)));
    return result;
  }
  const int hot = routing.hot_experts;
  if (hot >= experts)
    throw UserError(fmt::format("routing '{}': the model has {} experts; make fewer than that hot",
                                describe(routing), experts));
  // A hot expert gets fraction / hot, a cold one (1 - fraction) / cold: here times hot * cold.
  const int64_t fraction = std::llround(kWeightOne * routing.hot_fraction);
  const int64_t hot_weight = fraction * (experts - hot);
  const int64_t cold_weight = (static_cast<int64_t>(kWeightOne) - fraction) * hot;
  for (int i = 0; i < experts; ++i) result.weights[i] = i < hot ? hot_weight : cold_weight;
  if (cold_weight > hot_weight) {  // a small fraction: the "hot" ones are the least popular
    std::ranges::reverse(result.weights);
    std::ranges::reverse(result.expert);
  }
  return result;
}

// Splits `total` in proportion to falling weights, none above `limit` (limit * weights.size() >= total).
Row apportion(Row weights, int64_t total, int64_t limit) {
  const size_t n = weights.size();
  Row shares(n);
  __int128 weight = 0;
  for (const int64_t w : weights) weight += w;

  // Falling weights: when the first one left stays within the limit, all do.
  size_t first = 0;
  int64_t rest = total;
  for (; first < n && rest > 0; ++first) {
    if (weight == 0) {  // only unpopular experts are left: they share evenly
      std::fill(weights.begin() + static_cast<ptrdiff_t>(first), weights.end(), 1);
      weight = static_cast<__int128>(n - first);
    }
    if (static_cast<__int128>(weights[first]) * rest <= limit * weight) break;
    shares[first] = limit;
    rest -= limit;
    weight -= weights[first];
  }
  if (rest == 0) return shares;

  // Largest remainder; ties go to the more popular. A share at the limit has no remainder, so none passes it.
  std::vector<std::pair<__int128, size_t>> remainders;
  remainders.reserve(n - first);
  int64_t left = rest;
  for (size_t i = first; i < n; ++i) {
    const __int128 product = static_cast<__int128>(weights[i]) * rest;
    shares[i] = static_cast<int64_t>(product / weight);
    left -= shares[i];
    remainders.emplace_back(-(product - shares[i] * weight), i);
  }
  if (left > 0) std::ranges::nth_element(remainders, remainders.begin() + left);
  for (int64_t i = 0; i < left; ++i) ++shares[remainders[i].second];
  return shares;
}

// Even shares; the larger ones spaced evenly, all moved on by `shift` experts.
Row even(int64_t total, int experts, int64_t shift) {
  Row shares(static_cast<size_t>(experts));
  const int64_t odd = total % experts;
  for (int64_t e = 0; e < experts; ++e)
    shares[(e + shift) % experts] = total / experts + ((e + 1) * odd / experts - e * odd / experts);
  return shares;
}

// ---- text

// Takes trailing ",seed=7" and ",independent" off `text`.
void take_options(std::string_view& text, Routing& routing) {
  for (size_t comma; (comma = text.rfind(',')) != std::string_view::npos; text = text.substr(0, comma)) {
    const std::string_view option = text.substr(comma + 1);
    if (option == "independent") {
      routing.independent_groups = true;
    } else if (option.starts_with("seed=")) {
      const auto seed = number<uint64_t>(option.substr(5));
      if (!seed)
        throw UserError(
            fmt::format("routing seed '{}' is not a whole number from 0 to 2^64-1; write it like ,seed=7",
                        option.substr(5)));
      routing.seed = *seed;
    } else {
      break;  // part of a file name, or an error that the kind reports
    }
  }
}

}  // namespace

Routing parse_routing(std::string_view text) {
  Routing routing;
  std::string_view rest = text;
  take_options(rest, routing);
  const size_t colon = rest.find(':');
  const std::string_view name = rest.substr(0, colon);
  const std::string_view value =
      colon == std::string_view::npos ? std::string_view() : rest.substr(colon + 1);
  const auto fail = [&](std::string_view why) {
    throw UserError(fmt::format("routing '{}': {}; {}", text, why, kForms));
  };
  const auto kind = std::ranges::find(kKinds, name);
  if (name.empty()) fail("no kind is given");
  if (kind == kKinds.end())
    throw UserError(fmt::format("{}; {}", unknown_name("routing", name, kKinds), kForms));
  routing.kind = static_cast<Routing::Kind>(kind - kKinds.begin());

  switch (routing.kind) {
    case Routing::Kind::balanced:
      if (colon != std::string_view::npos) fail("balanced takes no value");
      break;
    case Routing::Kind::zipf: {
      const auto exponent = number<double>(value);
      if (!exponent || !(*exponent >= 0) || *exponent > 100)
        fail("the exponent must be a number from 0 to 100");
      routing.exponent = *exponent;
      break;
    }
    case Routing::Kind::hot: {
      const size_t at = value.find('@');
      if (at == std::string_view::npos) fail("give the part of the tokens and the number of experts");
      const auto fraction = number<double>(value.substr(0, at));
      const auto experts = number<int>(value.substr(at + 1));
      if (!fraction || !(*fraction >= 0 && *fraction <= 1))
        fail("the part of the tokens must be from 0 to 1");
      if (!experts || *experts < 1) fail("the number of hot experts must be a whole number from 1");
      routing.hot_fraction = *fraction;
      routing.hot_experts = *experts;
      break;
    }
    case Routing::Kind::histogram:
      if (value.empty()) fail("no file is given");
      routing.file = value;
      routing.counts = read_histogram(routing.file);
      break;
  }
  return routing;
}

std::string describe(const Routing& routing) {
  std::string text = kKinds[static_cast<size_t>(routing.kind)];
  switch (routing.kind) {
    case Routing::Kind::balanced:
      break;
    case Routing::Kind::zipf:
      text += fmt::format(":{}", routing.exponent);
      break;
    case Routing::Kind::hot:
      text += fmt::format(":{}@{}", routing.hot_fraction, routing.hot_experts);
      break;
    case Routing::Kind::histogram:
      text += ":" + routing.file;
      break;
  }
  if (routing.seed != 0) text += fmt::format(",seed={}", routing.seed);
  if (routing.independent_groups) text += ",independent";
  return text;
}

std::vector<int64_t> draw(const Routing& routing, int64_t tokens, int top_k, int experts, int layer,
                          int group) {
  ensure(top_k >= 1 && top_k <= experts && experts < (1 << 20), "1 <= top_k <= experts < 2^20");
  ensure(tokens >= 0 && tokens < (int64_t{1} << 40), "0 <= tokens < 2^40");
  ensure(layer >= 0 && group >= 0, "layer and group count from 0");
  if (!routing.independent_groups) group = 0;
  const int64_t copies = tokens * top_k;
  if (routing.kind == Routing::Kind::balanced) return even(copies, experts, int64_t{layer} + group);

  Popularity popular = popularity(routing, experts, layer, group);
  const Row shares = apportion(std::move(popular.weights), copies, tokens);
  Row result(shares.size());
  for (size_t i = 0; i < shares.size(); ++i) result[popular.expert[i]] = shares[i];
  return result;
}

double imbalance(std::span<const int64_t> loads) {
  const int64_t total = std::accumulate(loads.begin(), loads.end(), int64_t{0});
  if (total == 0) return 1;
  return static_cast<double>(*std::ranges::max_element(loads)) * static_cast<double>(loads.size()) /
         static_cast<double>(total);
}

int64_t effective_experts(std::span<const int64_t> loads) {
  double sum = 0, squares = 0;
  for (const int64_t load : loads) {
    const auto rows = static_cast<double>(load);
    sum += rows;
    squares += rows * rows;
  }
  return squares == 0 ? 1 : std::max<int64_t>(1, std::llround(sum * sum / squares));
}

}  // namespace mop::plan
