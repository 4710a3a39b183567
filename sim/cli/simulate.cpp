#include <fmt/format.h>

#include <memory>

#include "sim/base/error.h"
#include "sim/cli/answer.h"
#include "sim/cli/commands.h"
#include "sim/cli/flags.h"
#include "sim/cli/text.h"
#include "sim/cli/trace.h"
#include "sim/search/planner.h"

namespace mop::cli {
namespace {

struct Simulate {
  Flags flags;
  bool unfold = false;
  std::string trace;

  explicit Simulate(CLI::App& command) : flags(command, Flags::Values::one, {"mop"}) {
    command.add_flag("--unfold", unfold, "simulate every rank instead of one of each kind")->group("Answer");
    command.add_option("--trace", trace, "timeline of the last step for Perfetto or chrome://tracing")
        ->type_name("FILE")
        ->group("Answer");
    command.footer(
        "Plan settings have flags of their own, such as --ep 8; mop show plan --help lists them.\n"
        "Example:\n"
        "  mop simulate --model kimi-k2 --cluster h200 --nodes 12 --context 1M --trace kimi-k2.trace.json\n"
        "  mop simulate --model qwen3-30b-a3b --cluster h200x4 --plan fsdp2 --ep 4 --format json");
  }

  void run(const Invocation& invocation) {
    flags.read_file();
    predict::Scenario scenario = flags.scenario();
    predict::validate(scenario);
    std::optional<store::Store> store = flags.open_store();
    const std::string key = keys_of(scenario).key;
    {
      Progress progress("choosing the plan");
      scenario.plan =
          search::choose(scenario, [&](size_t done, size_t total) { progress.show(done, total); });
    }
    predict::Details details;
    const predict::Prediction p =
        predict::predict(scenario, {unfold, false}, trace.empty() ? nullptr : &details);
    if (store) store->insert(record(key, scenario, p, invocation.command_line));
    fmt::print("{}", flags.json() ? pretty(answer_json(scenario, p)) + "\n" : answer_text(scenario, p));
    if (trace.empty()) return;
    if (!p.fits) throw UserError(fmt::format("no timeline is written to '{}': the plan does not fit", trace));
    write_trace(trace, scenario, details);
    fmt::print(stderr, "mop: timeline in {}; open it at https://ui.perfetto.dev\n", trace);
  }
};

}  // namespace

void add_simulate(CLI::App& program, const Invocation& invocation) {
  CLI::App* command = program.add_subcommand("simulate", "predict one plan, and explain it");
  const auto simulate = std::make_shared<Simulate>(*command);
  command->callback([simulate, &invocation] { simulate->run(invocation); });
}

}  // namespace mop::cli
