// The timeline is what Perfetto can read, and what the prediction says.
#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "tests/cli/process.h"

namespace mop::test {
namespace {

using Json = nlohmann::json;

struct Traced {
  Json answer, events;
};

Traced trace(std::vector<std::string> args) {
  const Folder folder;
  args.insert(args.begin(), "simulate");
  args.insert(args.end(), {"--no-store", "--format", "json", "--trace", "t.json"});
  const Ended ended = folder.mop(args);
  EXPECT_EQ(ended.status, 0) << ended.err;
  return {Json::parse(ended.out), Json::parse(folder.read("t.json")).at("traceEvents")};
}

void expect_readable(const Traced& t) {
  std::map<std::pair<int, int>, double> end_of_track;
  std::map<std::pair<int, std::string>, double> counted_at;
  std::map<std::pair<int, std::string>, int64_t> most;
  std::set<int> named_processes, processes;
  std::set<std::pair<int, int>> named_tracks;
  for (const Json& event : t.events) {
    const std::string phase = event.at("ph");
    const int pid = event.at("pid");
    if (phase == "M") {
      if (event.at("name") == "process_name") named_processes.insert(pid);
      if (event.at("name") == "thread_name") named_tracks.insert({pid, event.at("tid")});
    } else if (phase == "X") {
      processes.insert(pid);
      const std::pair<int, int> track{pid, event.at("tid")};
      const double start = event.at("ts"), duration = event.at("dur");
      EXPECT_GE(start, 0);
      EXPECT_GE(duration, 0);
      if (event.at("args").contains("busy_us")) {
        EXPECT_GE(event.at("args").at("busy_us").get<double>(), 0);
        EXPECT_LE(event.at("args").at("busy_us").get<double>(), duration);
      }
      EXPECT_GE(start, end_of_track[track] - 2e-3)
          << event;  // streams run one at a time; text has three digits
      end_of_track[track] = start + duration;
      EXPECT_FALSE(event.at("name").get<std::string>().empty());
      EXPECT_TRUE(event.at("args").contains("phase"));
      EXPECT_TRUE(named_tracks.contains(track)) << "a track is named before its events";
    } else {
      ASSERT_EQ(phase, "C");
      const std::pair<int, std::string> counter{pid, event.at("name")};
      EXPECT_GE(event.at("ts").get<double>(), counted_at[counter]);
      counted_at[counter] = event.at("ts");
      const int64_t bytes = event.at("args").at("bytes");
      EXPECT_GE(bytes, 0);
      most[counter] = std::max(most[counter], bytes);
    }
  }
  EXPECT_FALSE(processes.empty());
  EXPECT_EQ(processes, named_processes);
  EXPECT_EQ(processes.size(), t.answer.at("rank_classes").get<size_t>());
  // Overlap in time may keep fewer or, by a buffer or two, more alive than the order of issue does.
  const auto hbm = static_cast<double>(most.at({0, "HBM, live bytes"}));
  EXPECT_NEAR(hbm / t.answer.at("hbm_allocated_bytes").get<double>(), 1, 0.15);
}

TEST(Trace, Fsdp2) {
  expect_readable(trace({"--model", "qwen3-30b-a3b", "--cluster", "h200x4", "--plan", "fsdp2", "--ep", "4"}));
}

TEST(Trace, MopWithManyKindsOfRank) {
  const Traced t = trace({"--model", "mixtral-8x7b", "--context", "32K", "--ulysses", "4", "--ep", "8",
                          "--checkpoints", "host", "--optimizer", "host", "--routing", "zipf:1.2"});
  expect_readable(t);
  std::set<std::string> streams;
  for (const Json& event : t.events)
    if (event.at("name") == "thread_name") streams.insert(event.at("args").at("name"));
  for (const char* stream : {"compute", "gather", "dispatch", "combine", "sequence", "h2d", "d2h", "host"})
    EXPECT_TRUE(streams.contains(stream)) << stream;
}

}  // namespace
}  // namespace mop::test
