// One prediction or one measurement: the same fields, so that the two can be laid side by side.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace mop::store {

inline constexpr std::string_view kPrediction = "prediction";
inline constexpr std::string_view kMeasurement = "measurement";

// Text is UTF-8. Times are seconds, sizes are bytes. An empty optional is "not known" (NULL in the database).
// A record comes back from the database bit for bit, but for -0.0, which comes back as 0.0.
struct RunRecord {
  std::optional<int64_t> id;  // in its database, which gives it; it does not count in comparisons

  // What this is and where it comes from.
  std::string kind;      // kPrediction or kMeasurement
  std::string created;   // UTC, "2026-11-22T08:27:03Z": see now_utc()
  std::string version;   // of the product that answered
  std::string command;   // the command line that asked
  std::string machine;   // what it ran on, or was predicted for
  std::string sweep;     // name of the sweep that it belongs to; empty: none
  std::string key;       // see Keys
  std::string scenario;  // see Keys

  // The question.
  std::string model;
  std::string cluster;
  int64_t nodes = 0;
  int64_t gpus = 0;        // in all nodes together
  int64_t context = 0;     // tokens of one sequence
  int64_t sequences = 0;   // as the workload counts them
  int64_t accumulate = 0;  // micro-steps of one optimizer step
  std::string plan_family;
  std::string plan;  // text form, every degree in it
  std::string calibration;

  // The answer.
  bool fits = false;
  std::optional<int64_t> hbm_allocated_bytes;  // largest GPU: what the allocator held
  std::optional<int64_t> hbm_peak_bytes;       // largest GPU: with context, communicators and workspaces
  std::optional<int64_t> hbm_capacity_bytes;   // of one GPU
  std::optional<int64_t> host_peak_bytes;      // fullest node
  std::optional<int64_t> host_capacity_bytes;  // of one node
  std::optional<double> step_time_s;           // empty when it does not fit
  int64_t tokens_per_step = 0;                 // over all GPUs and micro-steps
  std::optional<double> tokens_per_s_per_gpu;
  std::optional<double> model_flops_per_token;  // forward and backward, without recompute; a MAC is 2
  std::optional<double> mfu;                    // 0..1
  std::optional<double> exposed_communication_s;
  std::string bound_by;       // the binding constraint or resource
  std::string detail = "{}";  // the complete answer, a JSON object
  std::string label;          // what the user calls it; empty: nothing
};
bool operator==(const RunRecord& a, const RunRecord& b);

// Hashes that say which question a record answers, 16 hexadecimal digits each.
//   scenario  what was asked: a measurement has the scenario of its predictions, whichever version made them.
//   key       scenario, calibration and product version: the same key is the same answer, so a sweep that
//             was interrupted skips the keys that it already has.
struct Keys {
  std::string scenario, key;
};

// Keys of the JSON object `inputs`: model, cluster, nodes, gpus, workload, plan with every degree, routing
// and whatever else decides the answer, plus "calibration" and "version", which count in the key alone. The
// order of members and white space do not matter, nor does 1.0 for 1.
// Errors: InternalError when `inputs` is no JSON object or lacks "calibration" or "version".
Keys keys_of(std::string_view inputs);

// The time now as RunRecord::created wants it.
std::string now_utc();

// Errors: InternalError naming the field when a record must not be stored: unknown kind, a time of another
// form than now_utc(), a key or scenario that keys_of did not make, a number that is negative or not finite,
// a step time although it does not fit, or a detail that is no JSON object.
void check(const RunRecord& record);

}  // namespace mop::store
