// One measurement beside its prediction of today, and what explains the difference.
#pragma once
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "sim/predict/predict.h"
#include "sim/store/record.h"
#include "sim/validate/op_sums.h"

namespace mop::validate {

// Seconds of one kind of operation. Those of the compute stream and kIdle add up to the step; others run
// beside them.
struct OpDifference {
  std::string name, stream;
  double measured = 0, predicted = 0;
  double measured_count = 0, predicted_count = 0;
  double difference() const { return measured - predicted; }
};
inline constexpr const char* kIdle = "compute stream idle";

// predicted / measured - 1; 0 when both are 0, infinite when only the measured one is.
double relative_error(double predicted, double measured);

struct Comparison {
  store::RunRecord measured;
  std::string database;          // that has it, where several are judged together
  std::string why_not;           // it could not be predicted again, or is predicted not to fit; empty: it was
  predict::Scenario scenario;    // with the routing that the run recorded, where it did
  std::string stated_routing;    // before anybody could know that
  std::optional<double> step_s;  // predicted; likewise the rest
  int64_t hbm_bytes = 0, host_bytes = 0;
  bool on_gpus = true;  // of the CPU backend, memory is the arenas and times say nothing of the cluster
  bool held_out = false;
  double measured_step_s = 0;            // of the sums; 0: the run has none
  std::vector<OpDifference> operations;  // the largest difference first
  std::vector<std::string> notes;        // what else explains it

  bool predicted() const { return why_not.empty(); }
  double step_error() const { return relative_error(*step_s, *measured.step_time_s); }
  double hbm_error() const;
  double host_error() const;
};

// prediction: that was stored beside it; nullptr: none. cluster: to predict with; nullptr: the run's own, as
// it is now. details: receives what is behind the prediction; nullptr: nothing. Never throws UserError for a
// record that cannot be predicted: why_not says it.
Comparison compare(const store::RunRecord& measurement, const store::RunRecord* prediction,
                   const cluster::ClusterModel* cluster = nullptr, predict::Details* details = nullptr);

}  // namespace mop::validate
