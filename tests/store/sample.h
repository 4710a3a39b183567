// Records, folders and processes for the tests of the store.
#pragma once
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "sim/base/error.h"
#include "sim/store/columns.h"
#include "sim/store/store.h"

namespace mop::store {

inline std::string hex(uint64_t number) {
  return fmt::format("{:016x}", number);
}

// A record that may be stored; `question` tells it from others.
inline RunRecord sample(uint64_t question, std::string_view kind = kPrediction, std::string sweep = "") {
  RunRecord record;
  record.kind = kind;
  record.created = "2026-11-22T08:27:03Z";
  record.version = "0.1.0";
  record.command = "mop predict --model kimi-k2";
  record.machine = "8xH200";
  record.sweep = std::move(sweep);
  record.key = hex(question);
  record.scenario = hex(question / 2);
  record.model = "kimi-k2";
  record.cluster = "h200";
  record.nodes = 2;
  record.gpus = 16;
  record.context = 131072;
  record.sequences = 16;
  record.accumulate = 1;
  record.plan_family = "mop";
  record.plan = "mop:ep=8,sp=2";
  record.calibration = "shipped";
  record.fits = true;
  record.hbm_peak_bytes = 100'000'000'000;
  record.hbm_capacity_bytes = 150'000'000'000;
  record.step_time_s = 3.25;
  record.tokens_per_step = 2'097'152;
  record.detail = R"({"a": [1, 2]})";
  return record;
}

class Folder : public testing::Test {
 protected:
  Folder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "mop-store-XXXXXX").string();
    folder = ::mkdtemp(pattern.data());
    ::chmod(folder.c_str(), 0777);
    path = folder / "results.db";
  }
  ~Folder() override { std::filesystem::remove_all(folder); }

  std::filesystem::path folder, path;
};

// The message of the UserError that `action` throws, or "no error".
inline std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const UserError& error) {
    return error.what();
  }
  return "no error";
}

// error_of in a child process, as a user without privileges when this one is root.
inline std::string error_in_child(const std::function<void()>& action, bool unprivileged = true) {
  int ends[2];
  if (::pipe(ends) != 0) return "no pipe";
  const pid_t child = ::fork();
  if (child == 0) {
    std::string message = "cannot change the user";
    if (!unprivileged || ::geteuid() != 0 || (::setgid(65534) == 0 && ::setuid(65534) == 0)) {
      message = error_of(action);
    }
    const auto written = ::write(ends[1], message.data(), message.size());
    ::_exit(written == static_cast<ssize_t>(message.size()) ? 0 : 1);
  }
  ::close(ends[1]);
  std::string message(4096, '\0');
  const auto count = ::read(ends[0], message.data(), message.size());
  ::close(ends[0]);
  message.resize(count > 0 ? static_cast<size_t>(count) : 0);
  ::waitpid(child, nullptr, 0);
  return message;
}

inline std::string bytes_of(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

#define EXPECT_SAYS(message, part) \
  EXPECT_NE((message).find(part), std::string::npos) << "message: " << (message)

}  // namespace mop::store
