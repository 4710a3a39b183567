#include "exec/cuda/activity.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>

#include "exec/cuda/activity_recorder.h"
#include "kernels/elementwise.h"
#include "kernels/fallback.h"
#include "tests/exec/cuda/occupy.h"
#include "tests/exec/train/support.h"
#include "tests/kernels/device_array.h"

namespace mop::cuda {
namespace {

using kernels::check;
using program::OpSpan;

TEST(Activities, GiveOperationsTheirTimes) {
  // By a clock that is 1000 ahead: launch 0 waits for room until 50, and its second kernel begins in the
  // first; of launch 1 nothing is known; launch 2 has two pieces with a wait between them.
  std::vector<OpSpan> spans{{7, 0, 100, 100}, {8, 100, 200, 200}, {9, 200, 300, 100}};
  refine(spans, {{2, 1280, 1299},
                 {0, 1060, 1090},
                 {0, 1050, 1080},
                 {2, 1201, 1211},
                 {3, 1, 2}});  // of no launch of this step
  EXPECT_EQ(spans[0].op, 7U);
  EXPECT_EQ(spans[0].start, 50);
  EXPECT_EQ(spans[0].end, 90);
  EXPECT_EQ(spans[0].busy, 40);
  EXPECT_EQ(spans[1].start, 100);
  EXPECT_EQ(spans[1].end, 200);
  EXPECT_EQ(spans[1].busy, 200);
  EXPECT_EQ(spans[2].start, 201);
  EXPECT_EQ(spans[2].end, 299);
  EXPECT_EQ(spans[2].busy, 29);
}

TEST(Activities, WithinOthersAddNothing) {
  std::vector<OpSpan> spans{{0, 0, 40, 40}};
  refine(spans, {{0, 0, 40}, {0, 10, 20}, {0, 30, 40}});
  EXPECT_EQ(spans[0].busy, 40);
  EXPECT_EQ(spans[0].end, 40);
}

TEST(Activities, OfClocksThatDriftApartAreMissedByAsLittleAsCanBe) {
  std::vector<OpSpan> spans{{0, 0, 10, 10}, {0, 1000, 1010, 10}};
  refine(spans, {{0, 0, 10}, {1, 1004, 1014}});
  EXPECT_EQ(spans[0].start, -2);
  EXPECT_EQ(spans[1].start, 1002);
}

TEST(Activities, NoneLeaveAllAsItWas) {
  std::vector<OpSpan> spans{{0, 3, 10, 7}};
  refine(spans, {});
  EXPECT_EQ(spans[0].start, 3);
  EXPECT_EQ(spans[0].end, 10);
  EXPECT_EQ(spans[0].busy, 7);
}

// ---- on a GPU

// Why a recorder stays off, where one has.
std::string& why_off() {
  static std::string why;
  kernels::warn_of_fallbacks([](const std::string& text) {
    if (text.find("not by CUPTI") != std::string::npos) why = text;
  });
  return why;
}

struct Queue {
  explicit Queue(int priority) {
    check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, priority), "a stream");
    for (cudaEvent_t* event : {&start, &end}) check(cudaEventCreate(event), "an event");
  }
  ~Queue() { cudaStreamDestroy(stream), cudaEventDestroy(start), cudaEventDestroy(end); }
  OpSpan span(cudaEvent_t origin) const {
    float from = 0, to = 0;
    check(cudaEventElapsedTime(&from, origin, start), "a time");
    check(cudaEventElapsedTime(&to, origin, end), "a time");
    const auto begun = static_cast<int64_t>(from * 1e6), ended = static_cast<int64_t>(to * 1e6);
    return {0, begun, ended, ended - begun};
  }
  cudaStream_t stream = nullptr;
  cudaEvent_t start = nullptr, end = nullptr;
};

TEST(Activities, OfWhatWaitsForRoomAreShort) {
  if (const std::string reason = kernels::no_gpu(); !reason.empty()) GTEST_SKIP() << reason;
  const std::string& why = why_off();
  const kernels::DeviceBytes few(4096);
  int least = 0, greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "priorities");
  const Queue first(greatest), second(least);
  ActivityRecorder recorder;
  const auto launch = [&](size_t index, const Queue& queue, const auto& body) {
    check(cudaEventRecord(queue.start, queue.stream), "an event");
    if (recorder.on()) recorder.begin(index);
    body(queue.stream);
    if (recorder.on()) recorder.end();
    check(cudaEventRecord(queue.end, queue.stream), "an event");
  };
  const auto both = [&] {
    launch(0, first, [&](cudaStream_t stream) { testing::occupy(std::chrono::milliseconds(2), stream); });
    launch(1, second, [&](cudaStream_t stream) {  // a kernel: what clears needs no multiprocessor
      auto* const values = static_cast<float*>(few.get());
      kernels::copy(
          {{values, kernels::Type::f32, 1, 512, 512}, {values + 512, kernels::Type::f32, 1, 512, 512}},
          stream);
    });
    check(cudaDeviceSynchronize(), "both");
  };
  both();  // loads the kernels
  recorder.start();
  if (!recorder.on()) GTEST_SKIP() << why;
  both();
  const std::vector<OpSpan> by_events{first.span(first.start), second.span(first.start)};
  std::vector<OpSpan> spans = by_events;
  refine(spans, recorder.activities());
  EXPECT_GT(by_events[1].busy, 1'000'000) << "it did not have to wait";
  EXPECT_GT(spans[1].busy, 0);
  EXPECT_LT(spans[1].busy, 100'000);
  EXPECT_GT(spans[0].busy, 1'000'000);
  for (size_t i = 0; i < 2; ++i) {  // 20 us of clocks
    EXPECT_GE(spans[i].start, by_events[i].start - 20'000);
    EXPECT_LE(spans[i].end, by_events[i].end + 20'000);
    EXPECT_LE(spans[i].busy, spans[i].end - spans[i].start);
  }
}

TEST(Activities, OnceOffCostNothing) {
  if (const std::string reason = kernels::no_gpu(); !reason.empty()) GTEST_SKIP() << reason;
  const std::string& why = why_off();
  const kernels::DeviceBytes few(4096);
  const Queue queue(0);
  const auto launches = [&] {  // seconds of the host and the GPU
    double best = 1;
    for (int attempt = 0; attempt < 20; ++attempt) {
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < 1000; ++i)
        kernels::clear({{few.get(), kernels::Type::f32, 1, 1024, 1024}}, queue.stream);
      check(cudaStreamSynchronize(queue.stream), "launches");
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
      best = std::min(best, taken.count());
    }
    return best;
  };
  launches();
  const double before = launches();
  ActivityRecorder recorder;
  recorder.start();
  if (!recorder.on()) GTEST_SKIP() << why;
  recorder.begin(0);
  const double during = launches();
  recorder.end();
  recorder.stop();
  EXPECT_EQ(recorder.activities().size(), 20'000U);
  recorder.clear();
  const double after = launches();
  EXPECT_LT(after, 1.2 * before) << fmt::format(
      "1000 launches took {} s before, {} s while recorded, {} s after", before, during, after);
  EXPECT_TRUE(recorder.activities().empty());
}

TEST(Activities, OfAProfiledStepAreThoseOfEveryOperation) {
  if (const std::string reason = kernels::no_gpu(); !reason.empty()) GTEST_SKIP() << reason;
  const std::string& why = why_off();
  using namespace train::testing;
  const RandomSequences data(32, 256);
  for (const std::string& plan :
       {std::string("fsdp2:runtime=native"),
        mop_plan(1, 1, 1, 1, "checkpoints=host,optimizer=host,save-attention=off")}) {
    Trial setup{"tiny-qwen3-moe", plan, 1, 1};
    setup.precision = plan::Precision::bf16;
    SCOPED_TRACE(setup.text());
    const train::Prepared prepared(setup.job());
    train::TrainerOptions o = options();
    o.trace = true;
    train::Trainer trainer(prepared, data, o,
                           train::make_cuda_machine(prepared, o, launch::Place{}, launch::alone()));
    trainer.start(weights::RandomSource(prepared.job.model, 3));
    for (int i = 0; i < 2; ++i) trainer.step();
    // Operations of the compute stream that wait for nothing are one span.
    const auto expect_few = [&](size_t most) {
      const std::vector<OpSpan> few = trainer.profiled_trace(0);
      EXPECT_TRUE(trainer.machine().timed_by_events());
      EXPECT_LT(few.size(), most);
      int64_t end = 0;
      for (const OpSpan& span : few) {
        EXPECT_EQ(span.busy, span.end - span.start);
        if (prepared.program.ops[span.op].stream != program::Stream::compute) continue;
        EXPECT_GE(span.start, end) << prepared.program.op_name(span.op);
        end = span.end;
      }
    };
    expect_few(prepared.program.ops.size());
    const int64_t bytes = trainer.machine().device_bytes_in_use();

    trainer.machine().profile(true);
    if (!why.empty()) GTEST_SKIP() << why;
    trainer.step();
    trainer.machine().profile(false);
    const std::vector<OpSpan> profiled = trainer.profiled_trace(0), by_events = trainer.machine().trace(0);
    EXPECT_FALSE(trainer.machine().timed_by_events());
    EXPECT_EQ(profiled.size(), by_events.size());
    int64_t busy = 0;
    for (const OpSpan& span : profiled) {
      EXPECT_GT(span.busy, 0) << prepared.program.op_name(span.op);
      EXPECT_LE(span.busy, span.end - span.start) << prepared.program.op_name(span.op);
      busy += span.busy;
    }
    // Within the events around it and those that wait for nothing beside it.
    for (size_t i = 0; i < profiled.size(); ++i) {
      EXPECT_GE(profiled[i].start, by_events[i].start - 20'000) << prepared.program.op_name(profiled[i].op);
      EXPECT_LE(profiled[i].end, by_events[i].end + 20'000) << prepared.program.op_name(profiled[i].op);
    }
    EXPECT_GT(busy, 0);
    EXPECT_LE(trainer.machine().device_bytes_in_use(), bytes + (4 << 20)) << "CUPTI's memory counts";

    trainer.step();
    expect_few(profiled.size());
  }
}

}  // namespace
}  // namespace mop::cuda
