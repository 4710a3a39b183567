// The question that a measurement answers, as its record keeps it: enough to predict it again with today's
// cost model.
#pragma once
#include <string>

#include "sim/predict/scenario.h"
#include "sim/store/record.h"

namespace mop::validate {

// A JSON object for the record's detail, under kQuestion. model, cluster: as they were given, a name or a
// path; config: the text of the model's, as the run found it.
inline constexpr const char* kQuestion = "question";
std::string to_json(const predict::Scenario& scenario, const std::string& model, const std::string& config,
                    const std::string& cluster);

// Rows of each expert on each MoE layer, as the run's routers chose in its last step: an array of arrays.
inline constexpr const char* kExpertRows = "expert_rows";

// A path that is not there is looked for under the data folder, too; names stay.
std::string locate(const std::string& name_or_path);

// From the record's own question or, of an older measurement, from the prediction that was stored beside it
// (nullptr: there is none). A model that is gone is the one of the config that the record keeps. cluster: in
// the place of the run's. Errors: UserError when it cannot be known, the cluster is gone, or the model of
// that name is another one now.
predict::Scenario scenario_of(const store::RunRecord& measurement, const store::RunRecord* prediction,
                              const cluster::ClusterModel* cluster = nullptr);

}  // namespace mop::validate
