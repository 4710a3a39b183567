// The arena planner against a second, slower notion of order: a graph of all operations of two consecutive
// steps.
#include "sim/program/arena.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "sim/program/builder.h"
#include "tests/program/support.h"

namespace mop::program::testing {
namespace {

// before(a, b): operation a has completed when b starts, whatever the durations. Operations of the next step
// count on.
class Reach {
 public:
  explicit Reach(const StepProgram& p)
      : ops_(p.ops.size()), words_((2 * ops_ + 63) / 64), bits_(2 * ops_ * words_) {
    std::vector<std::vector<size_t>> incoming(2 * ops_);
    std::array<size_t, kStreams> last{};
    for (size_t node = 0; node < 2 * ops_; ++node) {
      const auto stream = static_cast<size_t>(p.ops[node % ops_].stream);
      if (last[stream] != 0) incoming[node].push_back(last[stream] - 1);
      last[stream] = node + 1;
    }
    for (const Dependency& d : p.dependencies) {
      if (d.distance == 0) {
        incoming[d.to].push_back(d.from);
        incoming[ops_ + d.to].push_back(ops_ + d.from);
      } else if (p.ops[d.from].region == 0 || p.ops[d.from].region != p.ops[d.to].region) {
        incoming[ops_ + d.to].push_back(d.from);
      }
    }
    for (size_t node = 0; node < 2 * ops_; ++node)
      for (const size_t from : incoming[node]) {
        for (size_t w = 0; w < words_; ++w) bits_[node * words_ + w] |= bits_[from * words_ + w];
        bits_[node * words_ + from / 64] |= uint64_t{1} << (from % 64);
      }
  }
  bool before(size_t a, size_t b) const { return bits_[b * words_ + a / 64] >> (a % 64) & 1; }
  size_t ops() const { return ops_; }

 private:
  size_t ops_, words_;
  std::vector<uint64_t> bits_;
};

struct Users {
  std::vector<OpId> ops;
  std::vector<uint32_t> regions;
};

std::vector<Users> users_of(const StepProgram& p) {
  std::vector<Users> users(p.buffers.size());
  for (OpId id = 0; id < p.ops.size(); ++id)
    for (const Use& use : p.uses_of(p.ops[id])) {
      Users& of = users[use.buffer];
      if (of.ops.empty() || of.ops.back() != id) of.ops.push_back(id);
      if (p.ops[id].region != 0) of.regions.push_back(p.ops[id].region);
    }
  return users;
}

// Every use of the one has completed before any use of the other, `later` steps on.
bool all_before(const Reach& reach, const Users& a, const Users& b, size_t later) {
  for (const OpId x : a.ops)
    for (const OpId y : b.ops)
      if (!reach.before(x, y + later * reach.ops())) return false;
  return true;
}

// Rounds interleave: what two buffers of one region hold may be live together.
bool share_a_region(const Users& a, const Users& b) {
  for (const uint32_t r : a.regions)
    if (std::find(b.regions.begin(), b.regions.end(), r) != b.regions.end()) return true;
  return false;
}

void expect_no_overlap(const StepProgram& p, size_t* sharing = nullptr) {
  const Reach reach(p);
  const std::vector<Users> users = users_of(p);
  const Arenas arenas = plan_arenas(p);
  for (const Space space : {Space::hbm, Space::host}) {
    const Arena& arena = space == Space::hbm ? arenas.hbm : arenas.host;
    EXPECT_GE(arena.bytes, arena.live_bytes);
    std::vector<BufferId> placed;
    for (BufferId b = 0; b < p.buffers.size(); ++b) {
      const Buffer& buffer = p.buffers[b];
      const bool used = buffer.persistent || (!users[b].ops.empty() && buffer.bytes > 0);
      if (buffer.space != space || !used) continue;
      ASSERT_NE(arena.offset[b], kNotHere) << p.buffer_name(b);
      EXPECT_EQ(arena.offset[b] % kAlignment, 0);
      EXPECT_LE(arena.offset[b] + buffer.bytes, arena.bytes) << p.buffer_name(b);
      if (buffer.bytes > 0) placed.push_back(b);
    }
    for (size_t i = 0; i < placed.size(); ++i)
      for (size_t j = i + 1; j < placed.size(); ++j) {
        const BufferId a = placed[i], b = placed[j];
        if (arena.offset[a] + p.buffers[a].bytes <= arena.offset[b] ||
            arena.offset[b] + p.buffers[b].bytes <= arena.offset[a])
          continue;
        if (sharing != nullptr) ++*sharing;
        const bool apart =
            !p.buffers[a].persistent && !p.buffers[b].persistent && !share_a_region(users[a], users[b]) &&
            ((all_before(reach, users[a], users[b], 0) && all_before(reach, users[b], users[a], 1)) ||
             (all_before(reach, users[b], users[a], 0) && all_before(reach, users[a], users[b], 1)));
        ASSERT_TRUE(apart) << p.buffer_name(a) << " and " << p.buffer_name(b)
                           << " may be live together and share bytes";
      }
  }
}

// Most bytes of live buffers at any operation, in issue order.
int64_t live_bytes(const StepProgram& p, Space space) {
  int64_t most = 0;
  for (OpId id = 0; id < p.ops.size(); ++id) {
    int64_t live = 0;
    for (const Buffer& b : p.buffers) {
      const int64_t bytes = (b.bytes + kAlignment - 1) / kAlignment * kAlignment;
      if (b.space == space && (b.persistent || (b.first != kNoOp && b.first <= id && id <= b.last)))
        live += bytes;
    }
    most = std::max(most, live);
  }
  return most;
}

StepProgram random_program(std::mt19937_64& random) {
  Builder b;
  std::vector<BufferId> written, kept;
  const auto below = [&](size_t n) { return random() % n; };
  const int streams = 1 + static_cast<int>(below(5));
  const auto stream = [&] { return static_cast<Stream>(below(static_cast<size_t>(streams))); };
  for (size_t i = below(4); i > 0; --i)
    kept.push_back(b.persistent("kept", static_cast<int64_t>(1 + below(5000)), Holds::weights));
  const auto space = [&] { return below(6) == 0 ? Space::host : Space::hbm; };
  int phase = 0;
  const size_t count = 5 + below(60);
  for (size_t i = 0; i < count; ++i) {
    if (below(12) == 0 && phase == 0) {
      b.begin_repeat(0);
      phase = 1;
    }
    std::vector<Operand> reads, writes;
    for (size_t k = below(3); k > 0 && !written.empty(); --k) reads.push_back(written[below(written.size())]);
    if (!kept.empty() && below(3) == 0) (below(2) == 0 ? reads : writes).push_back(kept[below(kept.size())]);
    if (!written.empty() && below(4) == 0) writes.push_back(written[below(written.size())]);
    for (size_t k = below(3); k > 0; --k) {
      const auto bytes = static_cast<int64_t>(below(10) == 0 ? 0 : 1 + below(100000));
      writes.push_back(phase > 0 && below(2) == 0 ? b.scratch("scratch", bytes, Holds::staging)
                                                  : b.buffer("buffer", bytes, Holds::staging, -1, space()));
      written.push_back(writes.back().buffer);
    }
    b.op({OpKind::add, stream()}, reads, writes);
    // Older buffers fall out of use, so that their bytes can be used again.
    if (written.size() > 6)
      written.erase(written.begin(), written.begin() + static_cast<std::ptrdiff_t>(below(3)));
    if (phase > 0 && ++phase > 6) {
      b.end_repeat();
      phase = 0;
      written.clear();
    }
    if (below(10) == 0 && phase == 0 && !written.empty()) b.touch(written[below(written.size())]);
  }
  if (phase > 0) b.end_repeat();
  return b.finish();
}

TEST(Arena, RandomProgramsNeverOverlap) {
  std::mt19937_64 random(8);
  size_t sharing = 0;
  for (int i = 0; i < 1500; ++i) {
    SCOPED_TRACE(i);
    expect_no_overlap(random_program(random), &sharing);
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(sharing, 1000u);  // or nothing was tried
}

TEST(Arena, OrderedAgreesWithReachability) {
  std::mt19937_64 random(9);
  size_t yes = 0;
  for (int i = 0; i < 60; ++i) {
    const StepProgram p = random_program(random);
    const Reach reach(p);
    const std::vector<Users> users = users_of(p);
    for (BufferId a = 0; a < p.buffers.size(); ++a)
      for (BufferId b = 0; b < p.buffers.size(); ++b) {
        const auto placed = [&](BufferId id) {
          return !p.buffers[id].persistent && p.buffers[id].bytes > 0 && !users[id].ops.empty();
        };
        if (a == b || !placed(a) || !placed(b) || p.buffers[a].space != p.buffers[b].space ||
            share_a_region(users[a], users[b]))
          continue;
        for (const size_t later : {0, 1}) {
          if (!ordered(p, a, b, static_cast<int>(later))) continue;
          ++yes;
          // The planner may know less than all, never more.
          ASSERT_TRUE(all_before(reach, users[a], users[b], later))
              << i << ": " << a << " before " << b << ", later " << later;
        }
      }
  }
  EXPECT_GT(yes, 1000u);
}

TEST(Arena, ALineOfBuffersNeedsTwo) {
  Builder b;
  BufferId x = b.buffer("x", 1024, Holds::staging);
  b.op({OpKind::add}, {}, {x});
  for (int i = 0; i < 10; ++i) {
    const BufferId y = b.buffer("y", 1024, Holds::staging);
    b.op({OpKind::add}, {x}, {y});
    x = y;
  }
  const Arenas arenas = plan_arenas(b.finish());
  EXPECT_EQ(arenas.hbm.live_bytes, 2048);
  EXPECT_EQ(arenas.hbm.bytes, 2048);
  EXPECT_EQ(arenas.host.bytes, 0);
}

TEST(Arena, BuffersOfFreeStreamsDoNotShare) {
  Builder b;
  const BufferId x = b.buffer("x", 1024, Holds::staging), y = b.buffer("y", 1024, Holds::staging);
  b.op({OpKind::add, Stream::compute}, {}, {x});
  b.op({OpKind::add, Stream::gather}, {}, {y});  // may run at any time beside it
  const StepProgram p = b.finish();
  EXPECT_FALSE(ordered(p, x, y, 0));
  EXPECT_EQ(plan_arenas(p).hbm.live_bytes, 1024);  // in issue order they are apart
  EXPECT_EQ(plan_arenas(p).hbm.bytes, 2048);
}

TEST(Arena, ReuseLooksAtTheNextStepToo) {
  // y is used after x in this step; but the next step's x, on its own stream, does not wait for this step's
  // y.
  Builder b;
  const BufferId x = b.buffer("x", 1024, Holds::staging), y = b.buffer("y", 1024, Holds::staging);
  const BufferId event = b.buffer("event", 0, Holds::staging), tail = b.persistent("tail", 0, Holds::staging);
  b.op({OpKind::add, Stream::gather}, {}, {x});
  b.op({OpKind::add, Stream::gather}, {x}, {event});
  b.op({OpKind::add, Stream::compute}, {event}, {});
  b.op({OpKind::add, Stream::h2d}, {event}, {});
  b.op({OpKind::add, Stream::compute}, {}, {y});
  b.op({OpKind::add, Stream::compute}, {y}, {tail});
  const StepProgram p = b.finish();
  EXPECT_TRUE(ordered(p, x, y, 0));
  EXPECT_FALSE(ordered(p, y, x, 1));
  EXPECT_EQ(plan_arenas(p).hbm.bytes, 2048);
}

TEST(Arena, SizesAreAligned) {
  Builder b;
  const BufferId p = b.persistent("p", 1, Holds::weights), q = b.persistent("q", 513, Holds::weights);
  b.op({OpKind::add}, {p, q}, {});
  const Arena arena = plan_arenas(b.finish()).hbm;
  EXPECT_EQ(arena.bytes, 512 + 1024);
  EXPECT_EQ(arena.offset[q] - arena.offset[p], 512);
}

TEST(Arena, LiveBytesAreTheMostAtAnyOperation) {
  std::mt19937_64 random(10);
  for (int i = 0; i < 300; ++i) {
    const StepProgram p = random_program(random);
    const Arenas arenas = plan_arenas(p);
    EXPECT_EQ(arenas.hbm.live_bytes, live_bytes(p, Space::hbm));
    EXPECT_EQ(arenas.host.live_bytes, live_bytes(p, Space::host));
  }
}

TEST(Arena, TinyModelsNeverOverlap) {
  for (const Case& c : tiny_cases()) {
    SCOPED_TRACE(c.text());
    expect_no_overlap(c.lower().program);
    if (HasFatalFailure()) return;
  }
}

// Shipped shapes, a few layers each (what repeats adds nothing but time).
TEST(Arena, ShippedShapesNeverOverlap) {
  for (const char* name : {"kimi-k2", "gpt-oss-120b", "qwen3-235b-a22b"})
    for (const std::string& plan :
         {std::string("fsdp2:ep=8,offload=on"), mop_plan(8, 16, 8, 8, "checkpoints=host,optimizer=host"),
          mop_plan(4, 8, 4, 8, "head-chunks=2,save-attention=off,optimizer=stream")}) {
      SCOPED_TRACE(std::string(name) + " " + plan);
      Lowered l = lower_model(name, plan, 16, 65536);
      l.model.layers = 5;
      l.model.window.resize(5);
      l.model.moe.resize(5);
      l.parameters = model::count_parameters(l.model);
      ExpertLoad load;
      load.computed = load.sent = l.copies();
      load.experts = l.model.experts / l.layout.expert.size;
      const StepProgram p =
          lower({l.model, l.parameters, l.plan, l.layout, l.work, 0, std::vector<ExpertLoad>(5, load)});
      expect_no_overlap(p);
      if (HasFatalFailure()) return;
    }
}

TEST(Arena, IsNotPlacedWhereLiveBytesAreTooMany) {
  const Lowered l = lower_model("olmoe-1b-7b", mop_plan(2, 4, 2, 2, "optimizer=host"), 4, 4096);
  const Arenas placed = plan_arenas(l.program);
  const int64_t hbm = placed.hbm.live_bytes, host = placed.host.live_bytes;
  EXPECT_EQ(plan_arenas(l.program, {hbm, host}).hbm.offset, placed.hbm.offset);
  EXPECT_EQ(plan_arenas(l.program, {hbm, host}).host.offset, placed.host.offset);
  for (const bool small : {false, true}) {
    const Arenas one = plan_arenas(l.program, small ? Capacities{hbm - 1, host} : Capacities{hbm, host - 1});
    EXPECT_EQ(one.hbm.bytes, small ? hbm : placed.hbm.bytes);
    EXPECT_EQ(one.host.bytes, small ? placed.host.bytes : host);
    EXPECT_EQ(one.hbm.live_by_holds, placed.hbm.live_by_holds);
  }
}

TEST(Arena, IsWithinFivePercentOfTheLiveBytes) {
  for (const std::string& name : model::shipped_models()) {
    if (name.starts_with("tiny")) continue;
    for (const int64_t context : {8192, 131072})
      for (const std::string& plan :
           {std::string("fsdp2"), std::string("fsdp2:offload=on"), std::string("fsdp2:ep=8"),
            std::string("fsdp2:runtime=native,ep=8"), std::string("fsdp2:runtime=native,offload=on,cp=4"),
            mop_plan(8, 16, 1, 8), mop_plan(8, 16, 4, 8, "checkpoints=host,optimizer=host"),
            mop_plan(4, 8, 8, 8, "optimizer=stream,save-attention=off"),
            mop_plan(8, 16, 4, 8, "vp-scheme=weights,head-chunks=4")}) {
        const model::ModelConfig c = model::read_config(name);
        if (plan.find("ulysses=8") != std::string::npos && c.heads % 8 != 0) continue;
        if (plan.find("head-chunks=4") != std::string::npos &&
            (c.heads % 16 != 0 || c.qk_norm == model::QkNorm::full))
          continue;
        if (plan.find("head-chunks=4") != std::string::npos && c.attention == model::Attention::gqa &&
            c.kv_heads % 4 != 0)
          continue;
        SCOPED_TRACE(name + " " + plan + " " + std::to_string(context));
        const Lowered l = lower_model(name, plan, 16, context);
        const Arenas arenas = plan_arenas(l.program);
        EXPECT_GE(arenas.hbm.bytes, arenas.hbm.live_bytes);
        // FSDP2's copies run ahead: buffers are held until the other streams know that they are free.
        EXPECT_GE(arenas.hbm.held_bytes, arenas.hbm.live_bytes);
        const bool fsdp = plan.starts_with("fsdp2") && !l.plan.native();
        EXPECT_LE(static_cast<double>(arenas.hbm.bytes),
                  1.05 * static_cast<double>(fsdp ? arenas.hbm.held_bytes : arenas.hbm.live_bytes));
        EXPECT_GE(arenas.host.bytes, arenas.host.live_bytes);
        EXPECT_LE(static_cast<double>(arenas.host.bytes), 1.05 * static_cast<double>(arenas.host.live_bytes));
      }
  }
}

}  // namespace
}  // namespace mop::program::testing
