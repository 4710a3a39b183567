// Scratch memory of one thread: allocated once, handed out and taken back like a stack.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "sim/program/program.h"

namespace mop::cpu {

class Workspace {
 public:
  explicit Workspace(int64_t bytes);

  // n elements, aligned to a cache line, not initialised; they stay until the enclosing Scope ends.
  // Errors: InternalError when they do not fit.
  template <typename T>
  std::span<T> take(int64_t n) {
    return {reinterpret_cast<T*>(take_bytes(n * static_cast<int64_t>(sizeof(T)))), static_cast<size_t>(n)};
  }

  // Gives back at its end what was taken since its start.
  class Scope {
   public:
    explicit Scope(Workspace& workspace) : workspace_(workspace), used_(workspace.used_) {}
    ~Scope() { workspace_.used_ = used_; }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Workspace& workspace_;
    int64_t used_;
  };

  // What take<T>(n) uses up, for whoever adds up sizes.
  static constexpr int64_t kAlignment = 64;
  template <typename T>
  static int64_t size(int64_t n) {
    return (n * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
  }

 private:
  std::byte* take_bytes(int64_t bytes);

  std::unique_ptr<std::byte[]> memory_;
  std::byte* start_ = nullptr;  // first aligned byte
  int64_t bytes_ = 0, used_ = 0;
};

// Bytes that a Workspace needs to run any operation of the program.
int64_t workspace_bytes(const program::StepProgram& program);

}  // namespace mop::cpu
