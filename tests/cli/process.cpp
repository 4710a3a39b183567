#include "tests/cli/process.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace mop::test {
namespace {

std::string slurp(const std::filesystem::path& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

}  // namespace

Process::Process(const std::vector<std::string>& args, const std::filesystem::path& folder,
                 size_t file_limit) {
  static std::atomic<int> serial = 0;
  const std::string stem = folder.string() + ".run" + std::to_string(serial++);
  out_ = stem + ".out";
  err_ = stem + ".err";
  std::vector<const char*> argv{MOP_BINARY};
  for (const std::string& arg : args) argv.push_back(arg.c_str());
  argv.push_back(nullptr);
  pid_ = fork();
  if (pid_ < 0) throw std::runtime_error("fork");
  if (pid_ > 0) return;
  const int out = open(out_.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0600);
  const int err = open(err_.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0600);
  dup2(out, STDOUT_FILENO);
  dup2(err, STDERR_FILENO);
  if (file_limit > 0) {
    const rlimit limit{file_limit, file_limit};
    setrlimit(RLIMIT_FSIZE, &limit);
    signal(SIGXFSZ, SIG_IGN);
  }
  if (chdir(folder.c_str()) == 0) execv(argv[0], const_cast<char* const*>(argv.data()));
  _exit(127);
}

void Process::interrupt() const {
  kill(pid_, SIGINT);
}

Ended Process::wait() {
  int status = 0;
  waitpid(pid_, &status, 0);
  Ended ended{WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), slurp(out_), slurp(err_)};
  std::filesystem::remove(out_);
  std::filesystem::remove(err_);
  return ended;
}

Folder::Folder() {
  std::string name = (std::filesystem::temp_directory_path() / "mop-cli-XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp");
  path_ = name;
}

Folder::~Folder() {
  std::filesystem::remove_all(path_);
}

void Folder::write(const std::string& name, const std::string& text) const {
  std::ofstream(path_ / name, std::ios::binary) << text;
}

std::string Folder::read(const std::string& name) const {
  return slurp(path_ / name);
}

}  // namespace mop::test
