// Peers over TCP: process 0 is connected with each of the others.
#pragma once
#include <memory>
#include <vector>

#include "exec/launch/peers.h"
#include "exec/launch/socket.h"
#include "exec/launch/watch.h"

namespace mop::launch {

class Star final : public Peers {
 public:
  // connections: at process 0 by rank, none at [0]; elsewhere one, to process 0. watch: none while a run
  // starts; what breaks then is a UserError.
  Star(int rank, int size, std::vector<Socket> connections, std::shared_ptr<Watch> watch);

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::vector<std::byte> broadcast(std::span<const std::byte> bytes) override;
  std::vector<std::vector<std::byte>> gather(std::span<const std::byte> bytes) override;
  void barrier() override;
  std::unique_ptr<Peers> channel() override;
  [[noreturn]] void abandon(const std::string& reason, int status) override;

  void set_watch(std::shared_ptr<Watch> watch) { watch_ = std::move(watch); }
  const std::vector<Socket>& connections() const { return connections_; }
  // Another set of them, collectively. Process 0 waits until then for the others.
  std::vector<Socket> connect_again(Clock::time_point until);

  // To and from one process: a u64 length, then the bytes.
  void send(int to, std::span<const std::byte> bytes);
  std::vector<std::byte> receive(int from);

 private:
  const Socket& with(int rank) const { return connections_[static_cast<size_t>(rank_ == 0 ? rank : 0)]; }
  [[noreturn]] void broken(int rank);

  const int rank_, size_;
  std::vector<Socket> connections_;
  std::shared_ptr<Watch> watch_;  // gone before the connections: it waits until nobody needs them
};

}  // namespace mop::launch
