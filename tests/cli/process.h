// Runs the product as its users do: as a process in a folder of its own.
#pragma once
#include <sys/types.h>

#include <filesystem>
#include <string>
#include <vector>

namespace mop::test {

struct Ended {
  int status = -1;  // of exit; 128 + signal when killed
  std::string out, err;
};

class Process {
 public:
  // file_limit: most bytes of any file that it writes; 0: none.
  Process(const std::vector<std::string>& args, const std::filesystem::path& folder, size_t file_limit = 0);
  void interrupt() const;  // as Ctrl-C does
  Ended wait();

 private:
  pid_t pid_;
  std::filesystem::path out_, err_;
};

// An empty folder that goes with the object.
class Folder {
 public:
  Folder();
  ~Folder();
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  const std::filesystem::path& path() const { return path_; }
  Ended mop(const std::vector<std::string>& args) const { return Process(args, path_).wait(); }
  void write(const std::string& name, const std::string& text) const;
  std::string read(const std::string& name) const;

 private:
  std::filesystem::path path_;
};

}  // namespace mop::test
