#include "tests/exec/support/allocations.h"

#include <atomic>
#include <cerrno>
#include <cstddef>

namespace {

std::atomic<bool> armed = false;
std::atomic<int64_t> allocations = 0;
thread_local int64_t own_allocations = 0;

}  // namespace

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__) || !defined(__GLIBC__)
constexpr bool kCounted = false;
#else
constexpr bool kCounted = true;

namespace {

void count_one() {
  ++own_allocations;
  if (armed.load(std::memory_order_relaxed)) allocations.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace

// operator new, Eigen and the C library end here.
extern "C" {
void* __libc_malloc(size_t bytes);
void* __libc_calloc(size_t count, size_t bytes);
void* __libc_realloc(void* old, size_t bytes);
void* __libc_memalign(size_t alignment, size_t bytes);

void* malloc(size_t bytes) {
  count_one();
  return __libc_malloc(bytes);
}
void* calloc(size_t count, size_t bytes) {
  count_one();
  return __libc_calloc(count, bytes);
}
void* realloc(void* old, size_t bytes) {
  count_one();
  return __libc_realloc(old, bytes);
}
void* memalign(size_t alignment, size_t bytes) {
  count_one();
  return __libc_memalign(alignment, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) {
  count_one();
  return __libc_memalign(alignment, bytes);
}
int posix_memalign(void** out, size_t alignment, size_t bytes) {
  count_one();
  *out = __libc_memalign(alignment, bytes);
  return *out == nullptr ? ENOMEM : 0;
}
}
#endif

namespace mop::test {

bool Allocations::counted() {
  return kCounted;
}

Allocations::Allocations() {
  allocations = 0;
  armed = true;
}
Allocations::~Allocations() {
  armed = false;
}
int64_t Allocations::count() const {
  return allocations;
}

int64_t allocations_of_thread() {
  return own_allocations;
}

}  // namespace mop::test
