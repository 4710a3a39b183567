#include "exec/checkpoint/write.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <stdio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "exec/checkpoint/folder.h"
#include "exec/checkpoint/xxh64.h"
#include "sim/base/error.h"
#include "sim/base/integer.h"

namespace mop::checkpoint {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kAlignment = 64;  // bytes, of an entry in its file

[[noreturn]] void fail(const char* verb, const fs::path& path) {
  const int error = errno;
  const bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
  throw UserError(fmt::format("cannot {} {}: {}; {}", verb, path.string(),
                              std::generic_category().message(error),
                              full ? "free space there, keep fewer checkpoints or choose another folder"
                                   : "check the folder and its permissions, or choose another"));
}

class OutputFile {
 public:
  explicit OutputFile(const fs::path& path)
      : path_(path), fd_(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)) {
    if (fd_ < 0) fail("write", path_);
  }
  ~OutputFile() { close(fd_); }
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(std::span<const std::byte> bytes, int64_t offset) {
    while (!bytes.empty()) {
      const ssize_t written = pwrite(fd_, bytes.data(), bytes.size(), offset);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail("write", path_);
      bytes = bytes.subspan(static_cast<size_t>(written));
      offset += written;
    }
  }
  void sync() {
    if (fsync(fd_) != 0) fail("write", path_);
  }

 private:
  fs::path path_;
  int fd_;
};

}  // namespace

RankFile write_rank(const fs::path& folder, size_t rank, std::span<const Part> parts) {
  OutputFile out(folder / rank_name(rank));
  RankFile file;
  for (const Part& part : parts) {
    ensure(part.type == program::Type::f32 || part.type == program::Type::bf16,
           "checkpoints hold f32 and bf16");
    const auto bytes = static_cast<int64_t>(part.data.size());
    ensure(bytes % program::size_of(part.type) == 0, "a part is whole elements");
    if (bytes == 0) continue;
    Entry& entry = file.entries.emplace_back();
    entry = {part.flat,
             part.what,
             part.type,
             part.first,
             bytes / program::size_of(part.type),
             ceil_div(file.bytes, kAlignment) * kAlignment,
             {}};
    for (int64_t at = 0; at < bytes; at += kChecked) {
      const auto piece =
          part.data.subspan(static_cast<size_t>(at), static_cast<size_t>(std::min(kChecked, bytes - at)));
      entry.checksums.push_back(xxh64(piece));
      out.write(piece, entry.offset + at);
    }
    file.bytes = entry.offset + bytes;
  }
  out.sync();
  return file;
}

void publish(const fs::path& folder, const Manifest& manifest, const fs::path& checkpoint) {
  {
    OutputFile out(folder / kManifestName);
    const std::string text = to_text(manifest);
    out.write(std::as_bytes(std::span(text)), 0);
    out.sync();
  }
  sync_folder(folder);
  std::error_code ignored;
  if (!fs::exists(checkpoint, ignored)) {
    if (rename(folder.c_str(), checkpoint.c_str()) != 0) fail("name", checkpoint);
  } else {
    if (renameat2(AT_FDCWD, folder.c_str(), AT_FDCWD, checkpoint.c_str(), RENAME_EXCHANGE) != 0)
      fail("replace", checkpoint);
    fs::remove_all(folder, ignored);  // the one replaced; the next writer removes what stays of it
  }
  sync_folder(checkpoint.parent_path());
}

void sync_folder(const fs::path& folder) {
  const int fd = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const bool synced = fd >= 0 && fsync(fd) == 0;
  const int error = errno;
  if (fd >= 0) close(fd);
  errno = error;
  if (!synced) fail("write", folder);
}

}  // namespace mop::checkpoint
