#include "exec/checkpoint/reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <ranges>

#include "exec/checkpoint/folder.h"
#include "exec/checkpoint/xxh64.h"
#include "sim/base/error.h"

namespace mop::checkpoint {
namespace {

namespace fs = std::filesystem;

std::string previous(const fs::path& checkpoint, int64_t step) {
  const std::vector<fs::path> older = checkpoints(fs::absolute(checkpoint).parent_path(), step);
  return older.empty() ? "there is no checkpoint before it"
                       : fmt::format("go on from the one before, {}", older.back().string());
}

void convert(std::span<const std::byte> from, program::Type type, std::span<float> out) {
  if (type == program::Type::f32) {
    std::memcpy(out.data(), from.data(), out.size_bytes());
    return;
  }
  for (size_t i = 0; i < out.size(); ++i) {
    uint16_t upper;
    std::memcpy(&upper, from.data() + 2 * i, 2);
    out[i] = std::bit_cast<float>(uint32_t{upper} << 16);
  }
}

}  // namespace

Reader::Reader(const fs::path& checkpoint) : path_(checkpoint) {
  const fs::path where = checkpoint / kManifestName;
  const data::MappedFile text(where);
  manifest_ = parse_manifest({reinterpret_cast<const char*>(text.bytes().data()), text.bytes().size()},
                             where.string());
  size_t pieces = 0;
  for (size_t f = 0; f < manifest_.files.size(); ++f) {
    const RankFile& file = manifest_.files[f];
    const fs::path name = checkpoint / rank_name(f);
    const auto bytes = static_cast<int64_t>(files_.emplace_back(name).bytes().size());
    if (bytes != file.bytes)
      throw UserError(fmt::format("{} has {} bytes instead of {}; {}", name.string(), bytes, file.bytes,
                                  previous(checkpoint, state().step)));
    for (const Entry& entry : file.entries) {
      covers_[{entry.flat, entry.what}].push_back({&entry, f, pieces});
      pieces += entry.checksums.size();
    }
  }
  checked_ = std::make_unique<std::atomic<bool>[]>(pieces);
  for (auto& [key, ranges] : covers_) {
    std::ranges::sort(ranges, [](const Range& a, const Range& b) {
      return std::pair(a.entry->first, b.entry->end()) < std::pair(b.entry->first, a.entry->end());
    });
    int64_t end = 0;
    std::erase_if(ranges, [&](const Range& range) {
      const bool superfluous = range.entry->end() <= end;
      end = std::max(end, range.entry->end());
      return superfluous;
    });
  }
}

void Reader::lacks(program::FlatGroup flat, What what, int64_t first, int64_t last) const {
  throw UserError(fmt::format("{} lacks elements {} to {} of the {} of {}; {}", path_.string(), first, last,
                              name(what), name(flat), previous(path_, state().step)));
}

// Checks bytes [begin, end) of a range against the checksums of their pieces.
void Reader::check(const Range& range, int64_t begin, int64_t end) const {
  const Entry& entry = *range.entry;
  const auto bytes = files_[range.file].bytes().subspan(static_cast<size_t>(entry.offset),
                                                        static_cast<size_t>(entry.bytes()));
  for (int64_t piece = begin / kChecked; piece * kChecked < end; ++piece) {
    const auto index = static_cast<size_t>(piece);
    std::atomic<bool>& checked = checked_[range.checked + index];
    if (checked.load(std::memory_order_relaxed)) continue;
    const int64_t from = piece * kChecked, size = std::min(kChecked, entry.bytes() - from);
    if (xxh64(bytes.subspan(static_cast<size_t>(from), static_cast<size_t>(size))) != entry.checksums[index])
      throw UserError(fmt::format("{} is damaged: the {} of {} do not match their checksum; {}",
                                  (path_ / rank_name(range.file)).string(), name(entry.what),
                                  name(entry.flat), previous(path_, state().step)));
    checked.store(true, std::memory_order_relaxed);
  }
}

void Reader::read(program::FlatGroup flat, What what, int64_t first, std::span<float> out) const {
  const int64_t last = first + static_cast<int64_t>(out.size());
  const auto found = covers_.find({flat, what});
  if (found == covers_.end()) lacks(flat, what, first, last);
  auto range =
      std::ranges::upper_bound(found->second, first, {}, [](const Range& r) { return r.entry->end(); });
  for (int64_t at = first; at < last; ++range) {
    if (range == found->second.end() || range->entry->first > at) lacks(flat, what, at, last);
    const Entry& entry = *range->entry;
    const int64_t size = program::size_of(entry.type), end = std::min(last, entry.end());
    const int64_t begin_byte = (at - entry.first) * size, end_byte = (end - entry.first) * size;
    check(*range, begin_byte, end_byte);
    convert(files_[range->file].bytes().subspan(static_cast<size_t>(entry.offset + begin_byte),
                                                static_cast<size_t>(end_byte - begin_byte)),
            entry.type, out.subspan(static_cast<size_t>(at - first), static_cast<size_t>(end - at)));
    at = end;
  }
}

Newest open_newest(const fs::path& folder) {
  Newest newest;
  for (const fs::path& checkpoint : checkpoints(folder) | std::views::reverse) {
    try {
      newest.reader.emplace(checkpoint);
      break;
    } catch (const UserError& error) {
      newest.skipped.push_back(error.what());
    }
  }
  return newest;
}

}  // namespace mop::checkpoint
