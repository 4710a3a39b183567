#include "exec/weights/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <system_error>
#include <unordered_set>
#include <utility>

#include "sim/base/error.h"

namespace mop::weights {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

constexpr int64_t kPrefix = 8;               // header length
constexpr int64_t kMaxHeader = 100'000'000;  // the format's own limit
constexpr const char* kAgain = "get the file again";

[[noreturn]] void fail(const fs::path& file, const std::string& problem, const std::string& next = kAgain) {
  throw UserError(fmt::format("{}: {}: {}", file.string(), problem, next));
}

// Names from a file, fit for one line of a message.
std::string printable(const std::string& text) {
  std::string result = text.substr(0, 200);
  for (char& c : result)
    if (c < ' ' || c > '~') c = '?';
  return result;
}

// Discarded if the text is not JSON.
Json parse(std::span<const std::byte> text) {
  const auto* first = reinterpret_cast<const char*>(text.data());
  return Json::parse(first, first + text.size(), nullptr, /*allow_exceptions=*/false);
}

bool is_size(const Json& value) {
  return value.is_number_unsigned() && value.get<uint64_t>() <= uint64_t{1} << 62;
}

// Bits of an element of any type of the format; 0 for an unknown one.
int64_t element_bits(const std::string& type) {
  static const std::unordered_map<std::string, int64_t> known{
      {"BOOL", 8},    {"U8", 8},   {"I8", 8},      {"F8_E4M3", 8}, {"F8_E5M2", 8},
      {"F8_E8M0", 8}, {"F4", 4},   {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"I16", 16},
      {"U16", 16},    {"F16", 16}, {"BF16", 16},   {"I32", 32},    {"U32", 32},
      {"F32", 32},    {"C64", 64}, {"F64", 64},    {"I64", 64},    {"U64", 64}};
  const auto found = known.find(type);
  return found == known.end() ? 0 : found->second;
}

// Whether a tensor of this shape has exactly `bytes`, without overflow.
bool fills(const std::vector<int64_t>& shape, int64_t bits, int64_t bytes) {
  int64_t total = bits;
  for (const int64_t n : shape)
    if (__builtin_mul_overflow(total, n, &total)) return false;
  return total % 8 == 0 && total / 8 == bytes;
}

Tensor parse_tensor(const fs::path& file, const std::string& name, const Json& entry,
                    std::span<const std::byte> data) {
  const auto bad = [&](const char* problem) {
    fail(file, fmt::format("tensor {} {}", printable(name), problem));
  };
  if (!entry.is_object() || !entry.contains("dtype") || !entry.contains("shape") ||
      !entry.contains("data_offsets"))
    bad("lacks its dtype, shape or data_offsets");
  const Json &type = entry["dtype"], &shape = entry["shape"], &offsets = entry["data_offsets"];
  Tensor tensor;
  if (!type.is_string() || element_bits(type.get<std::string>()) == 0) bad("has an unknown dtype");
  tensor.type = type.get<std::string>();
  if (!shape.is_array() || !std::all_of(shape.begin(), shape.end(), is_size)) bad("has a shape that is none");
  tensor.shape = shape.get<std::vector<int64_t>>();
  if (!offsets.is_array() || offsets.size() != 2 || !is_size(offsets[0]) || !is_size(offsets[1]))
    bad("has data_offsets that are not a pair of sizes");
  const auto first = offsets[0].get<int64_t>(), last = offsets[1].get<int64_t>();
  if (first > last) bad("ends before it begins");
  if (last > static_cast<int64_t>(data.size())) bad("goes beyond the end of the file: it is cut off");
  tensor.bytes = last - first;
  if (!fills(tensor.shape, element_bits(tensor.type), tensor.bytes))
    bad("has a shape that does not fit its bytes");
  tensor.data = data.data() + first;
  return tensor;
}

}  // namespace

TensorFile::TensorFile(fs::path path) : path_(std::move(path)), mapping_(path_) {
  const std::span<const std::byte> bytes = mapping_.bytes();
  uint64_t header = 0;
  if (bytes.size() < kPrefix) fail(path_, "is too short for a safetensors file");
  std::memcpy(&header, bytes.data(), sizeof header);
  if (header > kMaxHeader) fail(path_, "is not a safetensors file: its header would be over 100 MB");
  if (header > bytes.size() - kPrefix) fail(path_, "ends inside its header: it is cut off");
  const Json json = parse(bytes.subspan(kPrefix, header));
  if (!json.is_object()) fail(path_, "is not a safetensors file: its header is not a JSON object");

  const std::span<const std::byte> data = bytes.subspan(kPrefix + header);
  std::vector<std::pair<const std::byte*, int64_t>> parts;
  for (const auto& [name, entry] : json.items()) {
    if (name == "__metadata__") continue;
    if (name != printable(name))
      fail(path_, fmt::format("tensor {} has a name that no checkpoint has", printable(name)));
    const Tensor& tensor = tensors_.emplace(name, parse_tensor(path_, name, entry, data)).first->second;
    parts.emplace_back(tensor.data, tensor.bytes);
  }
  std::sort(parts.begin(), parts.end());
  const std::byte* end = data.data();
  for (const auto& [first, size] : parts) {
    if (first != end) fail(path_, "has tensors that overlap or leave gaps");
    end += size;
  }
  if (end != data.data() + data.size()) fail(path_, "goes on after its last tensor");
}

Checkpoint::Checkpoint(const fs::path& folder) {
  std::error_code ignored;  // what cannot be examined fails when it is opened
  if (fs::exists(folder / kSingleFile, ignored)) {
    files_.emplace_back(folder / kSingleFile);
    index();
    return;
  }
  const fs::path index_file = folder / kIndexFile;
  if (!fs::exists(index_file, ignored))
    throw UserError(
        fmt::format("{}: the folder holds neither {} nor {}: give the folder of a checkpoint in "
                    "the safetensors format",
                    folder.string(), kSingleFile, kIndexFile));
  const data::MappedFile mapping(index_file);
  const Json json = parse(mapping.bytes());
  if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object())
    fail(index_file, "is not an index of safetensors files");

  std::unordered_map<std::string, std::string> wanted;  // tensor -> file
  std::unordered_set<std::string> opened;
  for (const auto& [name, shard] : json["weight_map"].items()) {
    if (!shard.is_string()) fail(index_file, fmt::format("tensor {} has no file name", printable(name)));
    const auto file = shard.get<std::string>();
    if (file.empty() || file.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos)
      fail(index_file, fmt::format("'{}' is not the name of a file in this folder", printable(file)));
    wanted.emplace(name, file);
    if (!opened.insert(file).second) continue;
    if (!fs::exists(folder / file, ignored))
      fail(index_file,
           fmt::format("tensor {} is in {}, which the folder lacks", printable(name), printable(file)),
           "get the missing file");
    files_.emplace_back(folder / file);
  }
  index();
  for (const auto& [name, file] : wanted) {
    const Place place = find(name);
    if (!place || place.file->path().filename() != file)
      fail(index_file, fmt::format("tensor {} is not in {}", printable(name), printable(file)),
           "get the index and that file again");
  }
}

void Checkpoint::index() {
  for (const TensorFile& file : files_)
    for (const auto& [name, tensor] : file.tensors())
      if (!places_.emplace(name, Place{&file, &tensor}).second)
        fail(file.path(), fmt::format("tensor {} is in another file too", printable(name)),
             "get the checkpoint again");
}

Checkpoint::Place Checkpoint::find(const std::string& name) const {
  const auto found = places_.find(name);
  return found == places_.end() ? Place{} : found->second;
}

void read_block(const Tensor& tensor, const model::Stored& stored, int64_t row, int64_t col, int64_t rows,
                int64_t cols, float* out, int64_t ld) {
  const std::optional<Type> type = type_of(tensor.type);
  ensure(type && tensor.shape == stored.shape, "a tensor of a known type and the expected shape");
  const int64_t size = size_of(*type);
  const std::byte* first =
      tensor.data + size * (stored.offset + row * stored.row_stride + col * stored.col_stride);
  if (stored.col_stride <= stored.row_stride) {
    for (int64_t r = 0; r < rows; ++r)
      to_float(*type, first + r * stored.row_stride * size, stored.col_stride, cols, out + r * ld, 1);
    return;
  }
  // Transposed: by tiles, each read along the columns and written along the rows, so that what lies together
  // is touched together on both sides.
  constexpr int64_t kTile = 64;
  std::array<float, kTile * kTile> tile;
  for (int64_t c0 = 0; c0 < cols; c0 += kTile) {
    const int64_t width = std::min(kTile, cols - c0);
    for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
      const int64_t height = std::min(kTile, rows - r0);
      for (int64_t c = 0; c < width; ++c)
        to_float(*type, first + (r0 * stored.row_stride + (c0 + c) * stored.col_stride) * size,
                 stored.row_stride, height, tile.data() + c * kTile, 1);
      for (int64_t r = 0; r < height; ++r)
        for (int64_t c = 0; c < width; ++c)
          out[(r0 + r) * ld + c0 + c] = tile[static_cast<size_t>(c * kTile + r)];
    }
  }
}

namespace {

int64_t elements(const TensorPlan& tensor) {
  int64_t n = 1;
  for (const int64_t size : tensor.shape) n *= size;
  return n;
}

int64_t bytes(const TensorPlan& tensor) {
  return elements(tensor) * size_of(tensor.type);
}

// The header with its length before it, and spaces after it that align the data.
std::string header(std::span<const TensorPlan> tensors) {
  constexpr size_t kAlignment = 8;
  Json json{{"__metadata__", {{"format", "pt"}}}};
  int64_t offset = 0;
  for (const TensorPlan& tensor : tensors) {
    json[tensor.name] = {{"dtype", name(tensor.type)},
                         {"shape", tensor.shape},
                         {"data_offsets", {offset, offset + bytes(tensor)}}};
    offset += bytes(tensor);
  }
  std::string text = json.dump();
  text.resize((text.size() + kAlignment - 1) / kAlignment * kAlignment, ' ');
  const uint64_t length = text.size();
  std::string prefix(sizeof length, '\0');
  std::memcpy(prefix.data(), &length, sizeof length);
  return prefix + text;
}

std::string file_name(size_t file, size_t files) {
  return files == 1 ? kSingleFile : fmt::format("model-{:05}-of-{:05}.safetensors", file + 1, files);
}

}  // namespace

Writer::Writer(fs::path folder, std::vector<TensorPlan> plan, int64_t max_file_bytes)
    : folder_(std::move(folder)), plan_(std::move(plan)) {
  ensure(!plan_.empty(), "a checkpoint has tensors");
  int64_t in_file = 0;
  for (size_t i = 0; i < plan_.size(); ++i) {
    ensure(elements(plan_[i]) > 0, "a tensor has elements");
    if (i == 0 || in_file + bytes(plan_[i]) > max_file_bytes) {
      first_.push_back(i);
      in_file = 0;
    }
    in_file += bytes(plan_[i]);
  }
  first_.push_back(plan_.size());
}

Writer::~Writer() = default;

void Writer::open_next() {
  if (file_) file_->finish();
  const size_t first = first_[opened_], last = first_[opened_ + 1];
  file_ = std::make_unique<OutputFile>(folder_ / file_name(opened_, first_.size() - 1));
  file_->write(header(std::span(plan_).subspan(first, last - first)));
  ++opened_;
}

void Writer::append(std::span<const float> values) {
  while (!values.empty()) {
    ensure(tensor_ < plan_.size(), "no more elements than planned");
    if (left_ == 0) {
      left_ = elements(plan_[tensor_]);
      if (tensor_ == first_[opened_]) open_next();
    }
    const size_t n = std::min(values.size(), static_cast<size_t>(left_));
    file_->write(plan_[tensor_].type, values.first(n));
    values = values.subspan(n);
    left_ -= static_cast<int64_t>(n);
    if (left_ == 0) ++tensor_;
  }
}

void Writer::finish() {
  ensure(tensor_ == plan_.size(), "every tensor is complete");
  file_->finish();
  const size_t files = first_.size() - 1;
  if (files == 1) return;
  Json index{{"metadata", {{"total_size", 0}}}, {"weight_map", Json::object()}};
  int64_t total = 0;
  for (size_t file = 0; file < files; ++file) {
    for (size_t i = first_[file]; i < first_[file + 1]; ++i) {
      index["weight_map"][plan_[i].name] = file_name(file, files);
      total += bytes(plan_[i]);
    }
  }
  index["metadata"]["total_size"] = total;
  OutputFile out(folder_ / kIndexFile);
  out.write(index.dump(2) + "\n");
  out.finish();
}

}  // namespace mop::weights
