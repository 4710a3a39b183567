// The index, little-endian without padding:
//   9 bytes "MMIDIDX\0\0", u64 version 1, u8 type code, u64 sequences, u64 entries of the document list,
//   i32 tokens of each sequence, i64 byte offset of each in the .bin,
//   i64 the document list: the first sequence of each document, then the number of sequences;
//   multimodal data has a byte a sequence after that, which is not looked at.
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <string_view>

#include "exec/data/mapped_file.h"
#include "exec/data/tokens.h"
#include "sim/base/error.h"

namespace mop::data {
namespace {

static_assert(std::endian::native == std::endian::little, "the files are read as they are");

constexpr std::string_view kMagic{"MMIDIDX\0\0", 9};
constexpr int64_t kHeader = 34;  // bytes

enum class TypeCode : uint8_t { u8 = 1, i8, i16, i32, i64, f64, f32, u16 };

int64_t size_of(TypeCode type) {
  switch (type) {
    case TypeCode::u8:
    case TypeCode::i8:
      return 1;
    case TypeCode::i16:
    case TypeCode::u16:
      return 2;
    case TypeCode::i32:
      return 4;
    default:
      return 8;
  }
}

// The files' numbers are not aligned.
template <typename T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <typename T>
void convert(const std::byte* from, std::span<int32_t> out) {
  for (int32_t& id : out) {
    const auto value = static_cast<int64_t>(load<T>(from));
    id = static_cast<int32_t>(
        std::clamp<int64_t>(value, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()));
    from += sizeof(T);
  }
}

class Megatron final : public Tokens {
 public:
  explicit Megatron(const std::string& prefix)
      : name_(prefix + ".bin"), index_name_(prefix + ".idx"), index_(index_name_), data_(name_) {
    read_header();
    check_sequences();
    check_documents();
  }

  const std::string& name() const override { return name_; }
  int64_t documents() const override { return documents_; }

  int64_t begin(int64_t document) const override {
    const int64_t sequence = first_sequence(document);
    return sequence == sequences_ ? static_cast<int64_t>(data_.bytes().size()) / size_of(type_)
                                  : offset(sequence) / size_of(type_);
  }

  void read(int64_t first, std::span<int32_t> out) const override {
    const std::byte* const from = data_.bytes().data() + first * size_of(type_);
    switch (type_) {
      case TypeCode::u8:
        return convert<uint8_t>(from, out);
      case TypeCode::i8:
        return convert<int8_t>(from, out);
      case TypeCode::i16:
        return convert<int16_t>(from, out);
      case TypeCode::u16:
        return convert<uint16_t>(from, out);
      case TypeCode::i32:
        return convert<int32_t>(from, out);
      default:
        return convert<int64_t>(from, out);
    }
  }

 private:
  int32_t length(int64_t sequence) const { return load<int32_t>(lengths_ + 4 * sequence); }
  int64_t offset(int64_t sequence) const { return load<int64_t>(offsets_ + 8 * sequence); }
  int64_t first_sequence(int64_t document) const { return load<int64_t>(firsts_ + 8 * document); }

  void read_header() {
    const auto bytes = index_.bytes();
    const std::byte* const start = bytes.data();
    if (bytes.size() < kMagic.size() || std::memcmp(start, kMagic.data(), kMagic.size()) != 0)
      throw UserError(
          fmt::format("{} is not a Megatron index (it does not begin with MMIDIDX); make it with "
                      "tools/preprocess_data.py",
                      index_name_));
    if (bytes.size() < kHeader) truncated();
    const auto version = load<uint64_t>(start + 9);
    if (version != 1)
      throw UserError(
          fmt::format("{} has version {} of the index; only version 1 is known: write it anew with "
                      "Megatron's tools/preprocess_data.py",
                      index_name_, version));
    const auto code = load<uint8_t>(start + 17);
    type_ = static_cast<TypeCode>(code);
    if (code < 1 || code > 8 || type_ == TypeCode::f32 || type_ == TypeCode::f64)
      throw UserError(fmt::format(
          "{} has type code {}{}; token ids are u8, i8, i16, u16, i32 or i64 (codes 1 "
          "to 5 and 8): write it anew with one of those",
          index_name_, code, type_ == TypeCode::f32 || type_ == TypeCode::f64 ? " (floats)" : ""));
    const auto sequences = load<uint64_t>(start + 18), entries = load<uint64_t>(start + 26);
    const uint64_t rest = bytes.size() - kHeader;
    if (sequences > rest / 12 || entries > (rest - 12 * sequences) / 8) truncated();
    sequences_ = static_cast<int64_t>(sequences);
    documents_ = static_cast<int64_t>(entries) - 1;
    lengths_ = start + kHeader;
    offsets_ = lengths_ + 4 * sequences_;
    firsts_ = offsets_ + 8 * sequences_;
  }

  [[noreturn]] void truncated() const {
    throw UserError(fmt::format("{} is truncated: {} bytes are less than its header announces; copy it again",
                                index_name_, index_.bytes().size()));
  }

  void check_sequences() const {
    int64_t end = 0;
    const auto size = static_cast<int64_t>(data_.bytes().size());
    for (int64_t sequence = 0; sequence < sequences_; ++sequence) {
      if (length(sequence) < 0 || offset(sequence) != end)
        throw UserError(
            fmt::format("{}: sequence {} does not begin where the one before ends; write the data "
                        "anew with Megatron's tools",
                        index_name_, sequence));
      end += length(sequence) * size_of(type_);
    }
    if (end != size)
      throw UserError(fmt::format("{} has {} bytes, but {} describes {}: one of them is {}; copy both again",
                                  name_, size, index_name_, end,
                                  size < end ? "truncated" : "of another data set"));
  }

  void check_documents() const {
    bool good = documents_ >= 0 && first_sequence(0) == 0 && first_sequence(documents_) == sequences_;
    for (int64_t document = 0; good && document < documents_; ++document)
      good = first_sequence(document) <= first_sequence(document + 1);
    if (!good)
      throw UserError(
          fmt::format("{}: its documents do not cover its {} sequences in order; write the data anew "
                      "with Megatron's tools",
                      index_name_, sequences_));
  }

  std::string name_, index_name_;
  MappedFile index_, data_;
  TypeCode type_ = TypeCode::i32;
  int64_t sequences_ = 0, documents_ = 0;
  const std::byte *lengths_ = nullptr, *offsets_ = nullptr, *firsts_ = nullptr;
};

}  // namespace

std::unique_ptr<Tokens> open_megatron(const std::string& prefix) {
  return std::make_unique<Megatron>(prefix);
}

}  // namespace mop::data
