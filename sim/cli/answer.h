// A prediction as JSON, as a record of the database and as text.
#pragma once
#include <span>
#include <string>

#include "sim/predict/predict.h"
#include "sim/store/record.h"

namespace mop::cli {

// {"family": ..., "text": ..., every knob of the family}: numbers as numbers, switches as booleans.
std::string plan_json(const plan::Plan& plan);

// The complete answer, on one line. Times are null when the plan does not fit.
std::string answer_json(const predict::Scenario& scenario, const predict::Prediction& prediction);

std::string pretty(const std::string& json);                          // indented
std::string pretty_array(std::span<const std::string> json_objects);  // the same, as one array

// Which question this is; `asked` may have degrees left open. The same key is the same answer.
store::Keys keys_of(const predict::Scenario& asked);

// asked: its key. scenario: the same with its plan resolved.
store::RunRecord record(const std::string& key, const predict::Scenario& scenario,
                        const predict::Prediction& prediction, const std::string& command_line,
                        const std::string& sweep = "");

std::string headline(const predict::Scenario& scenario);  // "kimi-k2 on 12 x 8 GPUs of h200, ..."
std::string answer_text(const predict::Scenario& scenario, const predict::Prediction& prediction);
std::string warnings_text(std::span<const std::string> warnings);  // each once, the first few

}  // namespace mop::cli
