// What every benchmark has: this rank's GPU with its streams, memory full of random numbers, communicators;
// clocks; and a way to process 0, which keeps what all ranks measured. All ranks make the same calls in the
// same order.
#pragma once
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "exec/calibrate/families.h"
#include "exec/calibrate/findings.h"
#include "exec/calibrate/power_sensor.h"
#include "exec/cuda/memory.h"
#include "exec/cuda/peer_memory.h"
#include "exec/launch/peers.h"
#include "exec/launch/place.h"
#include "kernels/attention.h"
#include "kernels/grouped_matmul.h"
#include "kernels/matmul.h"

namespace mop::calibrate {

using Work = std::function<void(cudaStream_t)>;  // puts itself on the stream
using Seconds = std::vector<double>;             // of single runs

struct Job {
  Work work;
  cudaStream_t stream;
  double alone;  // seconds of a run, the same number on all ranks
};

struct Libraries {
  kernels::Matmul matmul;
  kernels::GroupedMatmul grouped;
  kernels::Attention attention;
};

enum class Runs {
  // Of kernels: behind heat every time, since in a step, too, the clock is that of what ran before.
  warm,     // small ones several between two events
  clocked,  // likewise, but seconds at the largest clock, which those that compute are as fast as
  cold,     // one, and nothing of its operands in the cache
  // Of exchanges and copies: one after the other, since what ranks do in between would have them wait for one
  // another.
  in_a_row,    // small ones several between two events
  one_by_one,  // each by itself between two events
};

class Bench {
 public:
  // Chooses the GPU. Errors: UserError when there are too few.
  Bench(const launch::Place& place, launch::Peers& peers);
  ~Bench();  // collective, as it ends communicators
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;

  int rank() const { return peers_.rank(); }
  int ranks() const { return peers_.size(); }
  launch::Peers& peers() { return peers_; }
  Findings& findings() { return findings_; }
  int64_t context_bytes() const { return context_bytes_; }  // of HBM, with the first kernel

  // Kernels, and what others wait for: with priority, as in exec/cuda/rank.cpp.
  cudaStream_t compute() const { return compute_; }
  cudaStream_t transfer() const { return transfer_; }
  cudaStream_t up() const { return up_; }
  cudaStream_t down() const { return down_; }

  // Memory of one large piece, at the same place on all ranks, with random bf16 numbers of deviation 1.
  std::byte* take(int64_t bytes);
  kernels::Matrix matrix(int64_t rows, int64_t cols, kernels::Type type = kernels::Type::bf16);
  const int32_t* upload(const std::vector<int32_t>& values);
  bool fits(int64_t bytes) const { return bytes + (int64_t{1} << 30) < arena_bytes_; }
  void release();                    // all that was taken
  std::byte* pinned(int64_t bytes);  // of the host; what an earlier call gave is gone
  int64_t arena_bytes() const { return arena_bytes_; }

  Libraries& libraries();             // there from the first call on
  ncclComm_t communicator(int size);  // of `size` neighbours; null on ranks that are left over
  bool in_group(int size) const { return rank() / size < ranks() / size; }
  cuda::PeerMemory& peer_memory();

  // A family's time begins; whether any is left, for all ranks the same.
  void begin(const Family& family);
  bool more();

  // Nothing on all ranks where any GPU does not tell; then what is clocked is warm.
  const std::optional<PowerSensor>& sensor() const { return sensor_; }
  double largest_clock() const;  // of the multiprocessors, Hz
  void read_clock(size_t index, cudaStream_t stream);
  double clock_between(size_t first, size_t second) const;  // mean of Hz, once both have been read

  // Runs it again and again, on all ranks at once, behind heat. mine: whether this rank runs it; rank 0
  // always does.
  Seconds time(const Work& work, cudaStream_t stream, Runs runs, bool mine = true);
  // One after the other for about `window` seconds, as often on every rank, on all at once that have it:
  // seconds of each but the first.
  Seconds again(const Job& job, bool mine, double window);
  // Both again and again at the same time, on streams of their own, for `window` seconds: seconds of each
  // while the other was running.
  std::pair<Seconds, Seconds> beside(const Job& a, const Job& b, bool mine = true, double window = 40e-3);
  // How many times as long a kernel and a transfer take beside one another as alone: by turns, some
  // milliseconds each, so that all have the clock of the same mixture. The transfer begins first, as what
  // comes late waits for room among the multiprocessors. Every rank comes.
  std::pair<std::vector<double>, std::vector<double>> slowdowns(const Job& kernel, const Job& transfer);
  double agreed(const Seconds& seconds);  // the median of all ranks' seconds
  int64_t used_bytes() const;             // of HBM, once nothing runs

  // Kept by process 0: a point for the slowest rank, a figure as the median over all. amount: of bytes or
  // operations, per run. Names: of a cluster file.
  void point(const std::string& table, const std::string& what, std::vector<double> at, double amount,
             const Seconds& seconds);
  void figure(const std::string& name, const std::string& what, const std::vector<double>& values);
  void figure(const std::string& name, const std::string& what, const Rates& rates);
  std::optional<Reading> reading(const Rates& rates);  // of all ranks; process 0's, nothing on others

  template <class T>
  T from_first(T value) {  // process 0's, to all
    const std::vector<std::byte> heard = peers_.broadcast(std::as_bytes(std::span(&value, 1)));
    std::memcpy(&value, heard.data(), sizeof value);
    return value;
  }
  // Everyone's, at process 0: by rank, or all together.
  std::vector<std::vector<double>> by_rank(const std::vector<double>& values);
  std::vector<double> at_first(const std::vector<double>& values);

 private:
  cudaEvent_t event(size_t index);
  void keep(const std::string& name, const std::string& what, const Reading& reading);
  void heat(double seconds, cudaStream_t stream);
  void fill(int64_t bytes);

  launch::Peers& peers_;
  Findings findings_;
  int64_t context_bytes_ = 0, arena_bytes_ = 0, taken_ = 0;
  cudaStream_t compute_ = nullptr, transfer_ = nullptr, up_ = nullptr, down_ = nullptr;
  std::unique_ptr<cuda::PinnedSlab> pinned_;
  int64_t pinned_bytes_ = 0;
  cuda::DeviceBytes arena_, heat_, heat_workspace_, clocks_;
  std::optional<PowerSensor> sensor_;
  std::unique_ptr<cuda::PeerMemory> peer_memory_;  // ends before the arena
  std::unique_ptr<Libraries> libraries_;
  std::map<int, ncclComm_t> communicators_;
  std::vector<cudaEvent_t> events_;
  std::string family_;
  std::chrono::steady_clock::time_point until_;
};

}  // namespace mop::calibrate
