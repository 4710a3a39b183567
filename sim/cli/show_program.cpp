#include <fmt/format.h>

#include <array>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "sim/base/error.h"
#include "sim/base/quantity.h"
#include "sim/cli/commands.h"
#include "sim/cli/flags.h"
#include "sim/cli/text.h"
#include "sim/predict/predict.h"
#include "sim/program/graph.h"
#include "sim/search/planner.h"

namespace mop::cli {
namespace {

using Json = nlohmann::ordered_json;
using program::StepProgram;

// Bytes are what the operation moves: of HBM for kernels, of the wire for the others; routed operations count
// one round at its capacity.
struct Sum {
  int64_t operations = 0;
  double bytes = 0, flops = 0;
};

using Sums = std::map<std::string, Sum>;

struct Counts {
  Sums by_kind, by_stream, by_phase;
};

Counts count(const StepProgram& program) {
  Counts counts;
  for (const program::Op& op : program.ops) {
    const program::Shape& shape = program.shape(op);
    for (Sum* sum : {&counts.by_kind[program::name(op.kind)], &counts.by_stream[program::name(op.stream)],
                     &counts.by_phase[program::name(op.phase)]}) {
      ++sum->operations;
      sum->bytes += program::hbm_bytes(op.kind, shape);
      sum->flops += program::flops(op.kind, shape);
    }
  }
  return counts;
}

const char* space_name(program::Space space) {
  return space == program::Space::hbm ? "hbm" : "host";
}

Json json_of(const Sums& sums) {
  Json json = Json::object();
  for (const auto& [name, sum] : sums)
    json[name] = {{"operations", sum.operations}, {"bytes", sum.bytes}, {"flops", sum.flops}};
  return json;
}

std::string text_of(const char* title, const Sums& sums) {
  TextTable table({title, "operations", "bytes", "TFLOP"}, "lrrr");
  for (const auto& [name, sum] : sums)
    table.add({name, std::to_string(sum.operations), format_bytes(sum.bytes),
               fmt::format("{:.3f}", sum.flops / 1e12)});
  return table.text() + "\n";
}

struct ShowProgram {
  Flags flags;
  bool ops = false, buffers = false;
  std::string dot;

  explicit ShowProgram(CLI::App& command) : flags(command, Flags::Values::one, {"mop"}) {
    command.add_flag("--ops", ops, "list every operation")->group("Answer");
    command.add_flag("--buffers", buffers, "list every buffer")->group("Answer");
    command
        .add_option("--dot", dot, "write the operations and what they wait for to this file, for Graphviz")
        ->group("Answer");
    command.footer(
        "Plan settings have flags of their own, such as --ep 8; mop show plan --help lists them.\n"
        "Example:\n"
        "  mop show program --model qwen3-30b-a3b --cluster h200x4 --context 32K --plan fsdp2 --buffers");
  }

  void run() {
    flags.read_file();
    predict::Scenario s = flags.scenario();
    predict::validate(s);
    s.plan = search::choose(s);
    predict::Details details;
    predict::predict(s, {.only_memory = true}, &details);
    const StepProgram& program = details.program(details.worst);
    if (!dot.empty()) write_graph(program);
    (this->*(flags.json() ? &ShowProgram::print_json : &ShowProgram::print_text))(s, details, program);
  }

  void write_graph(const StepProgram& program) const {
    std::ofstream file(dot);
    program::write_dot(file, program);
    if (!file.flush())
      throw UserError(fmt::format("cannot write graph file {}; check the folder and the space left", dot));
  }

  void print_json(const predict::Scenario& s, const predict::Details& details,
                  const StepProgram& program) const {
    const Counts counts = count(program);
    Json json{{"model", s.model.name},
              {"plan", plan::describe(s.plan)},
              {"operations", program.ops.size()},
              {"buffers", program.buffers.size()},
              {"dependencies", program.dependencies.size()},
              {"repeat_regions", program.regions.size() - 1},
              {"hbm_arena_bytes", details.hbm.bytes},
              {"hbm_live_bytes", details.hbm.live_bytes},
              {"host_arena_bytes", details.host.bytes},
              {"by_kind", json_of(counts.by_kind)},
              {"by_stream", json_of(counts.by_stream)},
              {"by_phase", json_of(counts.by_phase)}};
    if (ops)
      for (program::OpId id = 0; id < program.ops.size(); ++id) {
        const program::Op& op = program.ops[id];
        json["ops"].push_back({{"name", program.op_name(id)},
                               {"kind", program::name(op.kind)},
                               {"stream", program::name(op.stream)},
                               {"phase", program::name(op.phase)},
                               {"component", program::name(op.component)},
                               {"layer", op.layer},
                               {"region", op.region},
                               {"bytes", program::hbm_bytes(op.kind, program.shape(op))},
                               {"flops", program::flops(op.kind, program.shape(op))}});
      }
    if (buffers)
      for (program::BufferId id = 0; id < program.buffers.size(); ++id) {
        const program::Buffer& buffer = program.buffers[id];
        const program::Arena& arena = buffer.space == program::Space::hbm ? details.hbm : details.host;
        json["buffer_list"].push_back({{"name", program.buffer_name(id)},
                                       {"space", space_name(buffer.space)},
                                       {"holds", program::name(buffer.holds)},
                                       {"persistent", buffer.persistent},
                                       {"bytes", buffer.bytes},
                                       {"offset", arena.offset[id]}});
      }
    fmt::print("{}\n", json.dump(2));
  }

  void print_text(const predict::Scenario& s, const predict::Details& details,
                  const StepProgram& program) const {
    const Counts counts = count(program);
    fmt::print(
        "{}, plan {}\none rank's step: {} operations over {} buffers, {} dependencies, {} repeat regions\n",
        s.model.name, plan::describe(s.plan), program.ops.size(), program.buffers.size(),
        program.dependencies.size(), program.regions.size() - 1);
    fmt::print("HBM arena {}, most live {}; host arena {}\n\n",
               format_bytes(static_cast<double>(details.hbm.bytes)),
               format_bytes(static_cast<double>(details.hbm.live_bytes)),
               format_bytes(static_cast<double>(details.host.bytes)));
    fmt::print("{}{}{}", text_of("kind", counts.by_kind), text_of("stream", counts.by_stream),
               text_of("phase", counts.by_phase));
    fmt::print(
        "bytes: of HBM for kernels, of the message for the others; operations of a repeat region at one full "
        "round\n");
    if (ops) {
      TextTable table({"", "operation", "stream", "bytes", "GFLOP", "region"}, "rllrrr");
      for (program::OpId id = 0; id < program.ops.size(); ++id) {
        const program::Op& op = program.ops[id];
        table.add({std::to_string(id), program.op_name(id), program::name(op.stream),
                   format_bytes(program::hbm_bytes(op.kind, program.shape(op))),
                   fmt::format("{:.1f}", program::flops(op.kind, program.shape(op)) / 1e9),
                   std::to_string(op.region)});
      }
      fmt::print("\n{}", table.text());
    }
    if (buffers) {
      TextTable table({"buffer", "space", "holds", "bytes", "lives"}, "lllrl");
      for (program::BufferId id = 0; id < program.buffers.size(); ++id) {
        const program::Buffer& buffer = program.buffers[id];
        table.add({program.buffer_name(id), space_name(buffer.space), program::name(buffer.holds),
                   std::to_string(buffer.bytes),
                   buffer.persistent ? "always" : fmt::format("{} to {}", buffer.first, buffer.last)});
      }
      fmt::print("\n{}", table.text());
    }
  }
};

}  // namespace

void add_show_program(CLI::App& show) {
  CLI::App* command =
      show.add_subcommand("program", "operations and bytes of one rank's step by kind, stream and phase");
  const auto show_program = std::make_shared<ShowProgram>(*command);
  command->callback([show_program] { show_program->run(); });
}

}  // namespace mop::cli
