#include "exec/cuda/host_probe.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "exec/cuda/memory.h"
#include "exec/launch/peers.h"
#include "exec/train/job.h"
#include "tests/kernels/device_array.h"

namespace mop::cuda {
namespace {

// Of a plan whose states the CPU updates, and of one whose states stream: what is measured, and that it
// leaves the host's memory as it was.
TEST(HostProbe, MeasuresAndChangesNothing) {
  if (const std::string reason = kernels::no_gpu(); !reason.empty()) GTEST_SKIP() << reason;
  for (const auto& [optimizer, by_cpu] : {std::pair{"host", true}, {"stream", false}}) {
    SCOPED_TRACE(optimizer);
    train::Job job;
    job.model = model::read_config("tiny-qwen3-moe");
    job.plan = plan::parse_plan(
        std::string("mop:ep=1,dense-shard=1,ulysses=1,vp=1,vp-scheme=tokens,mla-exchange=expanded,"
                    "checkpoints=hbm,optimizer=") +
        optimizer);
    job.workload.context = 512;
    job.workload.sequences = 4;
    const train::Prepared prepared(job);
    const program::Arenas& arenas = prepared.memory.arenas;
    const PinnedSlab host(arenas.host.bytes);
    const DeviceBytes hbm = device_bytes(arenas.hbm.bytes, "a test");
    const interpreter::Memory memory(prepared.program, prepared.memory, hbm.get(), host.data());
    std::mt19937_64 random(7);  // any bits: infinite, not a number, minus zero
    for (int64_t i = 0; i + 8 <= arenas.host.bytes; i += 8) {
      const uint64_t bits = random();
      std::memcpy(host.data() + i, &bits, sizeof bits);
    }
    const std::vector<std::byte> before(host.data(), host.data() + arenas.host.bytes);
    const std::unique_ptr<launch::Peers> alone = launch::alone();
    const host::Rates rates = probe_host(prepared.program, memory, arenas.host.bytes, *alone, 1);
    EXPECT_GT(rates.both_ways, 1e8);
    EXPECT_EQ(rates.adam > 1e8, by_cpu);
    EXPECT_TRUE(std::equal(before.begin(), before.end(), host.data()));
    const host::Rates none = probe_host(prepared.program, memory, arenas.host.bytes, *alone);
    EXPECT_EQ(none.both_ways + none.adam, 0);
  }
}

}  // namespace
}  // namespace mop::cuda
