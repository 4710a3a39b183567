// mop run on one, two and four GPUs, as its users start it, against the same plan on the CPU. Each start on
// GPUs takes some ten seconds: choose with --gtest_filter, such as Same.*/g4_*, Same.*/g1_*, *Killed*,
// TwoNodes.*.
#include <arpa/inet.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/cli/process.h"
#include "tests/exec/cuda/processes.h"
#include "tests/kernels/device_array.h"
#include "tests/plan_text.h"

namespace mop::cuda::testing {
namespace {

using namespace std::chrono_literals;
using nlohmann::json;
using ::testing::HasSubstr;

constexpr auto kPatience = 300s;  // with any run
// Runs go on from where a little model has learnt enough for each of its parts to matter: without the second
// expert of a token the loss, then about 0.4, is 0.04 to 0.3 higher, and the gradient's norm differs by a
// third.
constexpr int kLearnt = 60, kSteps = 5;
// In bf16, whose roundings differ: of the loss; relative, of the gradient's norm at any step and on average.
// On the CPU 0.003, 4 % and 1 % here, and 17 % in one norm of 50 steps: a rounding sends a token to another
// expert.
constexpr double kLoss = 0.01, kNorm = 0.2, kMeanNorm = 0.03;

int gpus() {
  int count = 0;
  return kernels::no_gpu().empty() && cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}
std::string too_few(int needed) {
  return gpus() >= needed ? "" : fmt::format("{} GPUs are needed, {} are here", needed, gpus());
}

// Among the processes that mop run started; 0: none.
pid_t rank_1(const std::vector<pid_t>& children) {
  for (const pid_t child : children)
    if (environment_of(child, "RANK") == "1") return child;
  return 0;
}

struct Step {
  int64_t number = 0;
  double loss = 0, norm = 0;
};
// Of what has come so far.
std::vector<Step> steps_of(const std::string& out) {
  std::vector<Step> all;
  std::istringstream lines(out);
  for (std::string line; std::getline(lines, line) && !lines.eof();) {
    const json step = json::parse(line);
    all.push_back({step.at("step"), step.at("loss"),
                   step.at("gradient_norm").is_null() ? 0 : step.at("gradient_norm").get<double>()});
  }
  return all;
}

void expect_same(const std::vector<Step>& expected, const std::vector<Step>& actual) {
  ASSERT_EQ(actual.size(), expected.size());
  ASSERT_FALSE(actual.empty());
  double apart = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    EXPECT_EQ(actual[i].number, expected[i].number);
    EXPECT_NEAR(actual[i].loss, expected[i].loss, kLoss) << "step " << actual[i].number;
    EXPECT_NEAR(actual[i].norm / expected[i].norm, 1, kNorm) << "step " << actual[i].number;
    apart += std::abs(actual[i].norm / expected[i].norm - 1);
  }
  EXPECT_LE(apart, kMeanNorm * static_cast<double>(actual.size()));
}

struct Job {
  std::string model, plan;
  int ranks;
};

class Gpus : public ::testing::Test {
 protected:
  using Words = std::vector<std::string>;

  Gpus() {
    std::string text;
    for (int i = 0; i < 600; ++i)
      text += fmt::format("the quick brown fox jumps over {} lazy dogs and {} cats.\n", i % 10, i * i);
    folder.write("text.txt", text);
  }

  static Words words(const Job& job, const std::string& checkpoints, const char* rate, int64_t steps,
                     const Words& more) {
    std::istringstream line(fmt::format(
        "run --model {} --plan {} --data text.txt --context 64 --sequences 4 --lr {} --lr-decay constant "
        "--steps {} --save {} --format json --no-store",
        job.model, job.plan, rate, steps, checkpoints));
    Words all{MOP_BINARY};
    for (std::string word; line >> word;) all.push_back(word);
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  Process start(const Words& all, const std::map<std::string, std::string>& environment = {}) {
    return {all, environment, folder.path(), "run" + std::to_string(started++)};
  }
  std::vector<Step> finish(Process process) {
    EXPECT_EQ(process.wait(kPatience), 0) << process.err();
    return steps_of(process.out());
  }
  // A folder of its own with the checkpoint of a model that has learnt, once for all tests.
  std::string learnt(const std::string& model) {
    static const test::Folder shared;
    const std::filesystem::path first = shared.path() / model;
    const std::string copy = "checkpoints" + std::to_string(started);
    if (!std::filesystem::exists(first))
      finish(start(words({model, "fsdp2", 1}, first, "5e-3", kLearnt, {})));
    std::filesystem::copy(first, folder.path() / copy, std::filesystem::copy_options::recursive);
    return copy;
  }
  // The next steps. Ranks are threads on the CPU or processes on GPUs.
  Words next_steps(const Job& job, Words more) {
    more.push_back("--resume");
    return words(job, learnt(job.model), "5e-4", kLearnt + kSteps, more);
  }
  Process begin(const Job& job, const char* ranks, Words more = {}) {
    more.insert(more.end(), {ranks, std::to_string(job.ranks)});
    return start(next_steps(job, more));
  }

  test::Folder folder;
  int started = 0;
};

struct Named {
  std::string name;
  Job job;
};
void PrintTo(const Named& named, std::ostream* to) {
  *to << named.name << ": " << named.job.plan;
}

std::vector<Named> setups() {
  std::vector<Named> all;
  const auto add = [&](int n, const std::string& name, const std::string& model, const std::string& plan) {
    all.push_back({fmt::format("g{}_{}", n, name), {"tiny-" + model, plan, n}});
  };
  const std::string skewed = "round-rows=64,spill-min-rows=1,spill-gate=0.5", qwen = "qwen3-moe",
                    oss = "gpt-oss", v3 = "deepseek-v3";
  add(1, "qwen_rounds", qwen, mop_plan(1, 1, 1, 1, "round-rows=64"));
  add(1, "oss_fsdp2", oss, "fsdp2");
  add(1, "v3_hosts", v3, mop_plan(1, 1, 1, 1, "optimizer=host,checkpoints=host"));
  for (const int n : {2, 4}) {
    add(n, "oss_ep", oss, mop_plan(n, n, 1, 1));
    add(n, "qwen_ulysses", qwen, mop_plan(1, n, n, 1, "kept-layers=2"));
    add(n, "oss_kept", oss, mop_plan(1, n, 1, 1, "kept-layers=3"));
    add(n, "qwen_skewed", qwen, mop_plan(n, n, 1, 1, skewed));
    add(n, "v3_hosts", v3, mop_plan(n, n, n, 1, "optimizer=host,checkpoints=host,mla-exchange=latent"));
    add(n, "qwen_fsdp2_ep", qwen, fmt::format("fsdp2:ep={}", n));
  }
  add(4, "qwen_planned", qwen, "mop");
  add(4, "v3_skewed", v3, mop_plan(4, 2, 2, 4, "expert-placement=across,spill-slots=1," + skewed));
  add(4, "oss_stream", oss, mop_plan(2, 4, 2, 2, "optimizer=stream," + skewed));
  add(4, "oss_vp_tokens", oss, mop_plan(1, 4, 1, 4, "vp-scheme=tokens,vp-tile=24"));
  add(4, "qwen_vp_weights", qwen, mop_plan(1, 4, 1, 4, "vp-scheme=weights,vp-tile=24,head-chunks=2"));
  add(4, "v3_fsdp2", v3, "fsdp2:cp=2,offload=on");
  add(4, "oss_fsdp2_replicas", oss, "fsdp2:replicate=2,recompute=none,reshard=off");
  return all;
}

class Same : public Gpus, public ::testing::WithParamInterface<Named> {};

TEST_P(Same, AsOnTheCpu) {
  const Job& job = GetParam().job;
  if (const std::string reason = too_few(job.ranks); !reason.empty()) GTEST_SKIP() << reason;
  Process cpu = begin(job, "--ranks");
  const std::vector<Step> on_gpus = finish(begin(job, "--gpus"));
  expect_same(finish(std::move(cpu)), on_gpus);
}

// Needs no GPU: the plans run, and the tolerances allow what bf16 costs on the CPU.
class Rounded : public Same {};

TEST_P(Rounded, AsInFp32) {
  Process fp32 = begin(GetParam().job, "--ranks", {"--precision", "fp32"});
  const std::vector<Step> rounded = finish(begin(GetParam().job, "--ranks"));
  expect_same(finish(std::move(fp32)), rounded);
}

std::vector<Named> of_at_least(int ranks) {
  std::vector<Named> all = setups();
  std::erase_if(all, [&](const Named& one) { return one.job.ranks < ranks; });
  return all;
}
const auto name_of = [](const auto& suite) { return suite.param.name; };
INSTANTIATE_TEST_SUITE_P(, Same, ::testing::ValuesIn(setups()), name_of);
INSTANTIATE_TEST_SUITE_P(, Rounded, ::testing::ValuesIn(of_at_least(4)), name_of);

// The processes end within 30 seconds, one message says which rank is gone, and the checkpoints are good.
TEST_F(Gpus, KilledTheyEndTogetherAndResume) {
  const int n = gpus() >= 4 ? 4 : 2;
  if (const std::string reason = too_few(n); !reason.empty()) GTEST_SKIP() << reason;
  const Job job{"tiny-qwen3-moe", mop_plan(n, n, n, n, "optimizer=host"), n};
  const std::string checkpoints = learnt(job.model);
  const auto start_until = [&](int64_t step) {
    return start(words(job, checkpoints, "5e-4", step,
                       {"--resume", "--gpus", std::to_string(n), "--save-every", "3", "--keep", "1000"}));
  };
  Process process = start_until(1000000);
  ASSERT_TRUE(within(kPatience, [&] { return steps_of(process.out()).size() >= 10; })) << process.err();
  const std::vector<pid_t> children = process.children();
  ASSERT_EQ(static_cast<int>(children.size()), n);
  const pid_t victim = rank_1(children);
  ASSERT_GT(victim, 0);
  kill(victim, SIGKILL);
  EXPECT_EQ(process.wait(30s), 1);
  std::istringstream errors(process.err());
  int messages = 0;
  for (std::string line; std::getline(errors, line);)
    if (line.find("rank ") != std::string::npos) {
      ++messages;
      EXPECT_THAT(line, HasSubstr(fmt::format("mop: rank 1 (pid {}) was ended by signal 9", victim)));
    }
  EXPECT_EQ(messages, 1) << process.err();
  for (const pid_t child : children) EXPECT_NE(kill(child, 0), 0) << "process " << child << " lives";

  // From a checkpoint some steps before the last one that was seen.
  const std::vector<Step> before = steps_of(process.out());
  const int64_t last = before.back().number;
  int64_t from = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder.path() / checkpoints)) {
    const std::string name = entry.path().filename().string();
    const bool complete = name.find(".tmp-") == std::string::npos;
    const int64_t step = complete ? std::stoll(name.substr(name.find('-') + 1)) : 0;
    if (complete && step <= last - 3)
      from = std::max(from, step);
    else
      std::filesystem::remove_all(entry.path());
  }
  ASSERT_GT(from, kLearnt);
  Process resumed = start_until(last);
  EXPECT_EQ(resumed.wait(kPatience), 0);
  EXPECT_THAT(resumed.err(), HasSubstr(fmt::format("(step {}, {} ranks", from, n)));
  expect_same({before.begin() + (from - kLearnt), before.end()}, steps_of(resumed.out()));
}

// A rank that hangs is as good as dead.
TEST_F(Gpus, StoppedTheOthersEndWithinThirtySeconds) {
  if (const std::string reason = too_few(2); !reason.empty()) GTEST_SKIP() << reason;
  Process process = start(
      words({"tiny-qwen3-moe", mop_plan(2, 2, 2, 2), 2}, "checkpoints", "5e-4", 1000000, {"--gpus", "2"}));
  ASSERT_TRUE(within(kPatience, [&] { return steps_of(process.out()).size() >= 3; })) << process.err();
  const pid_t victim = rank_1(process.children());
  ASSERT_GT(victim, 0);
  kill(victim, SIGSTOP);
  EXPECT_EQ(process.wait(30s), 1);
  EXPECT_THAT(process.err(), HasSubstr("rank 1"));
}

TEST_F(Gpus, MoreRanksThanGpusAreRefused) {
  if (const std::string reason = too_few(1); !reason.empty()) GTEST_SKIP() << reason;
  const int more = 2 * gpus();
  Process process = start(
      words({"tiny-qwen3-moe", "fsdp2", more}, "checkpoints", "5e-4", 1, {"--gpus", std::to_string(more)}));
  EXPECT_EQ(process.wait(kPatience), 2);
  EXPECT_THAT(process.err(), HasSubstr(fmt::format("which has {} GPUs", gpus())));
}

// Others have all of its memory, or leave too little for the plan.
TEST_F(Gpus, ABusyGpuIsSaid) {
  if (const std::string reason = too_few(1); !reason.empty()) GTEST_SKIP() << reason;
  const std::vector<std::pair<size_t, const char*>> cases{{100, "gives no context"}, {4096, "is free"}};
  for (const auto& [megabytes, said] : cases) {
    size_t free = 0, total = 0;
    ASSERT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
    const kernels::DeviceBytes most(free - (megabytes << 20));
    Process process = start(words({"olmoe-1b-7b", "fsdp2", 1}, "checkpoints", "5e-4", 1, {"--gpus", "1"}));
    EXPECT_EQ(process.wait(kPatience), 2);
    EXPECT_THAT(process.err(), HasSubstr(said));
  }
}

// Two nodes, as NCCL sees them: nothing between them but sockets.
class TwoNodes : public Same {};
INSTANTIATE_TEST_SUITE_P(, TwoNodes, ::testing::ValuesIn(of_at_least(2)), name_of);

TEST_P(TwoNodes, AsOnTheCpu) {
  const Job& job = GetParam().job;
  const int n = job.ranks, each = n / 2;
  if (const std::string reason = too_few(n); !reason.empty()) GTEST_SKIP() << reason;
  // The launcher's port, of which ours is 17 away.
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  const int probe = socket(AF_INET, SOCK_STREAM, 0);
  ASSERT_EQ(bind(probe, reinterpret_cast<sockaddr*>(&address), size), 0);
  ASSERT_EQ(getsockname(probe, reinterpret_cast<sockaddr*>(&address), &size), 0);
  close(probe);
  std::vector<std::string> devices;
  const char* const visible = std::getenv("CUDA_VISIBLE_DEVICES");
  std::istringstream list(visible != nullptr ? visible : "0,1,2,3");
  for (std::string device; std::getline(list, device, ',');) devices.push_back(device);
  ASSERT_GE(static_cast<int>(devices.size()), n);
  const Words next = next_steps(job, {});
  std::vector<Process> processes;
  for (int rank = 0; rank < n; ++rank) {
    const int node = rank / each;
    std::string own;
    for (int i = 0; i < each; ++i) own += (i > 0 ? "," : "") + devices[static_cast<size_t>(node * each + i)];
    processes.push_back(start(next, {{"RANK", std::to_string(rank)},
                                     {"WORLD_SIZE", std::to_string(n)},
                                     {"LOCAL_RANK", std::to_string(rank % each)},
                                     {"LOCAL_WORLD_SIZE", std::to_string(each)},
                                     {"TORCHELASTIC_RUN_ID", fmt::format("test-{}", getpid())},
                                     {"MASTER_ADDR", "127.0.0.1"},
                                     {"MASTER_PORT", std::to_string(ntohs(address.sin_port) - 17)},
                                     {"CUDA_VISIBLE_DEVICES", own},
                                     {"NCCL_HOSTID", fmt::format("node{}", node)},
                                     {"NCCL_SOCKET_IFNAME", "lo"},
                                     {"NCCL_IB_DISABLE", "1"}}));
  }
  const std::vector<Step> expected = finish(begin(job, "--ranks"));
  std::vector<Step> actual;
  for (int rank = n - 1; rank >= 0; --rank) actual = finish(std::move(processes[static_cast<size_t>(rank)]));
  expect_same(expected, actual);
}

}  // namespace
}  // namespace mop::cuda::testing
