#include "exec/weights/output_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "sim/base/error.h"

namespace mop::weights {
namespace {

constexpr size_t kBuffer = size_t{1} << 20;

[[noreturn]] void fail(const std::filesystem::path& path) {
  throw UserError(fmt::format("cannot write {}: {}; free some space or choose another folder", path.string(),
                              std::generic_category().message(errno)));
}

}  // namespace

OutputFile::OutputFile(std::filesystem::path path) : path_(std::move(path)) {
  fd_ = open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd_ < 0) fail(path_);
  buffer_.reserve(kBuffer);
}

OutputFile::~OutputFile() {
  if (fd_ >= 0) close(fd_);
}

void OutputFile::write(std::string_view text) {
  const auto bytes = std::as_bytes(std::span(text));
  flush();
  buffer_.assign(bytes.begin(), bytes.end());
  flush();
}

void OutputFile::write(Type type, std::span<const float> values) {
  const auto size = static_cast<size_t>(size_of(type));
  while (!values.empty()) {
    if (buffer_.size() + size > kBuffer) flush();
    const size_t used = buffer_.size(), n = std::min(values.size(), (kBuffer - used) / size);
    buffer_.resize(used + n * size);
    from_float(type, values.data(), static_cast<int64_t>(n), buffer_.data() + used);
    values = values.subspan(n);
  }
}

void OutputFile::finish() {
  flush();
  if (fsync(fd_) != 0) fail(path_);
  if (close(std::exchange(fd_, -1)) != 0) fail(path_);
}

void OutputFile::flush() {
  std::span<const std::byte> left(buffer_);
  while (!left.empty()) {
    const ssize_t written = ::write(fd_, left.data(), left.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail(path_);
    left = left.subspan(static_cast<size_t>(written));
  }
  buffer_.clear();
}

}  // namespace mop::weights
