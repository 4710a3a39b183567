// A new file, written front to back through a buffer.
#pragma once
#include <cstddef>
#include <filesystem>
#include <span>
#include <string_view>
#include <vector>

#include "exec/weights/convert.h"

namespace mop::weights {

// Errors of all members: UserError when the file exists or the disk is full or fails.
class OutputFile {
 public:
  explicit OutputFile(std::filesystem::path path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(std::string_view text);
  void write(Type type, std::span<const float> values);  // converted
  void finish();                                         // everything is on the disk afterwards

 private:
  void flush();

  std::filesystem::path path_;
  int fd_ = -1;
  std::vector<std::byte> buffer_;
};

}  // namespace mop::weights
