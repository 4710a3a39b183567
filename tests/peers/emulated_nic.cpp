// The NIC of an emulated node, to be preloaded: LD_PRELOAD=libemulated_nic.so EMULATED_NIC=BYTES_PER_SECOND.
// What processes of one NCCL_HOSTID send through sockets leaves at that rate in all, as through a NIC that
// they share; without either variable nothing is held back. NCCL's sockets over the loopback are memory
// copies of one thread a GPU otherwise: at 3.8 to 5 GB/s, by what the thread has to do besides.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <string>

namespace {

constexpr int64_t kBurst = 256 << 10, kPiece = 64 << 10;  // bytes: sent at once after a pause; by one call
// Bytes that take their time and are never held back: words of control, which a program may send only once.
constexpr size_t kSmall = 4096;

int64_t now_ns() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000 + t.tv_nsec;
}

class Nic {
 public:
  Nic() {
    const char *const node = std::getenv("NCCL_HOSTID"), *const rate = std::getenv("EMULATED_NIC");
    if (node == nullptr || rate == nullptr) return;
    ns_per_byte_ = 1e9 / std::max(1.0, std::atof(rate));
    const std::string name = "/emulated-nic-" + std::to_string(getuid()) + "-" + node;
    const int file = shm_open(name.c_str(), O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, sizeof *free_at_) != 0) fail(name);
    void* const at = mmap(nullptr, sizeof *free_at_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (at == MAP_FAILED) fail(name);
    free_at_ = static_cast<std::atomic<int64_t>*>(at);
  }

  bool is_one() const { return free_at_ != nullptr; }

  // Nanoseconds until something may be sent; at 0 the time of `bytes` is taken.
  int64_t take(int64_t bytes) {
    const int64_t now = now_ns(), burst = time_of(kBurst);
    int64_t free_at = free_at_->load(std::memory_order_relaxed);
    do {
      if (free_at > now + burst) return free_at - now - burst;
    } while (!free_at_->compare_exchange_weak(free_at, std::max(free_at, now) + time_of(bytes)));
    return 0;
  }
  void give_back(int64_t bytes) { add(-bytes); }
  void add(int64_t bytes) { free_at_->fetch_add(time_of(bytes)); }

 private:
  int64_t time_of(int64_t bytes) const {
    return static_cast<int64_t>(static_cast<double>(bytes) * ns_per_byte_);
  }
  [[noreturn]] static void fail(const std::string& name) {
    std::perror(("emulated NIC, shared memory " + name).c_str());
    _exit(2);
  }

  double ns_per_byte_ = 0;
  std::atomic<int64_t>* free_at_ = nullptr;  // CLOCK_MONOTONIC: when what was taken has left
};

bool waits(int socket, int flags) {
  return (flags & MSG_DONTWAIT) == 0 && (fcntl(socket, F_GETFL) & O_NONBLOCK) == 0;
}

}  // namespace

extern "C" ssize_t send(int socket, const void* data, size_t bytes, int flags) {
  static const auto real =
      reinterpret_cast<ssize_t (*)(int, const void*, size_t, int)>(dlsym(RTLD_NEXT, "send"));
  static Nic nic;
  if (!nic.is_one()) return real(socket, data, bytes, flags);
  if (bytes <= kSmall) {
    nic.add(static_cast<int64_t>(bytes));
    return real(socket, data, bytes, flags);
  }
  const auto piece = static_cast<int64_t>(std::min<size_t>(bytes, kPiece));
  while (const int64_t ns = nic.take(piece)) {
    if (!waits(socket, flags)) {
      errno = EAGAIN;
      return -1;
    }
    const timespec pause{ns / 1'000'000'000, ns % 1'000'000'000};
    nanosleep(&pause, nullptr);
  }
  const ssize_t sent = real(socket, data, static_cast<size_t>(piece), flags);
  nic.give_back(piece - std::max<ssize_t>(sent, 0));
  return sent;
}
