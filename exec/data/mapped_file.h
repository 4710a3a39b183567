// A file mapped into memory, read-only; the system reads what is touched.
#pragma once
#include <cstddef>
#include <filesystem>
#include <span>

namespace mop::data {

class MappedFile {
 public:
  // Errors: UserError for a file that is missing, unreadable or not a regular file. An empty file has no
  // bytes.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::span<const std::byte> bytes_;
};

}  // namespace mop::data
