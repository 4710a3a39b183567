#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <span>

#include "sim/base/error.h"
#include "sim/base/quantity.h"
#include "sim/cli/answer.h"
#include "sim/cli/commands.h"
#include "sim/cli/flags.h"
#include "sim/cli/text.h"
#include "sim/search/parallel.h"
#include "sim/search/planner.h"
#include "sim/search/settings.h"
#include "sim/search/sweep.h"

namespace mop::cli {
namespace {

const std::atomic<bool> kNever = false;

struct Row {
  std::string plan, key;  // as given
  predict::Scenario scenario;
  predict::Prediction prediction;
  std::string warning;
};

struct Compare {
  Flags flags;
  bool unequal = false;
  std::string tokens;

  explicit Compare(CLI::App& command) : flags(command, Flags::Values::contexts, {"fsdp2", "mop"}) {
    CLI::Option* free =
        command.add_flag("--unequal-tokens", unequal,
                         "keep --accumulate; otherwise every plan of a context accumulates up to the "
                         "most tokens a step among them");
    free->group("Scenario");
    command
        .add_option("--tokens-per-step", tokens,
                    "tokens a step of every plan; sets the micro-batches of each")
        ->type_name("TOKENS")
        ->group("Scenario")
        ->excludes(free);
    command.footer(
        "Plan settings have flags of their own, such as --ep 8, for the plans that have them: mop show plan "
        "--help\n"
        "Example:\n"
        "  mop compare --model kimi-k2 --nodes 12 --context 128K..1M --plan fsdp2-best --plan mop\n"
        "  mop compare --model mixtral-8x7b --nodes 2 --context 8K,32K --plan fsdp2:ep=8 --plan mop");
  }

  void run(const Invocation& invocation) {
    flags.read_file();
    flags.check_knobs();
    if (!tokens.empty() && flags.typed("accumulate"))
      throw UserError("--tokens-per-step sets the micro-batches of each plan; leave --accumulate out");
    const std::vector<std::string> contexts = search::expand_range(flags.text("context"), "context");
    const predict::Scenario base = flags.scenario({"context", "plan"});
    std::optional<store::Store> store = flags.open_store();

    std::vector<Row> rows;  // those of a context stand together
    for (const std::string& context : contexts)
      for (const std::string& plan : flags.plans()) {
        Row& row = rows.emplace_back(Row{plan, "", base, {}, ""});
        search::set(row.scenario, "context", context);
        row.scenario.plan = flags.plan(plan);
        predict::validate(row.scenario);
        row.key = keys_of(row.scenario).key;
      }
    std::vector<size_t> all(rows.size());
    std::iota(all.begin(), all.end(), size_t{0});
    choose(rows, all);
    if (!unequal) {
      const int64_t before = base.workload.accumulate;
      for (size_t first = 0; first < rows.size(); first += flags.plans().size())
        equalise(std::span(rows).subspan(first, flags.plans().size()));
      // Micro-batches take memory, too: what is open is chosen again, but for what decides how many tokens
      // one has.
      std::erase_if(all, [&](size_t i) { return rows[i].scenario.workload.accumulate == before; });
      for (const size_t i : all) {
        plan::Plan again = flags.plan(rows[i].plan);
        const plan::Plan& chosen = rows[i].scenario.plan;
        again.sequence = chosen.sequence;
        again.context = chosen.context;
        again.tensor = chosen.tensor;
        rows[i].scenario.plan = again;
      }
      choose(rows, all);
    }
    predict_all(rows, store, invocation);
    print(rows, base);
  }

  // Plans of the rows `which`.
  static void choose(std::vector<Row>& rows, const std::vector<size_t>& which) {
    if (which.empty()) return;
    Progress progress("choosing plans");
    std::atomic<size_t> done = 0;
    search::parallel(
        which.size(), search::all_cores(), kNever,
        [&](size_t i) {
          predict::Scenario& scenario = rows[which[i]].scenario;
          scenario.plan = search::choose(scenario);
          ++done;
        },
        [&] { progress.show(done, which.size()); });
  }

  // Sets the micro-batches of each plan so that all train on equally many tokens a step.
  void equalise(std::span<Row> rows) const {
    int64_t target = tokens.empty() ? 0 : parse_count(tokens, "tokens-per-step");
    if (tokens.empty())
      for (const Row& row : rows) target = std::max(target, predict::tokens_per_step(row.scenario));
    for (Row& row : rows) {
      plan::Workload& workload = row.scenario.workload;
      const int64_t batch = predict::tokens_per_step(row.scenario) / workload.accumulate;
      if (target % batch != 0 && !tokens.empty())
        throw UserError(fmt::format(
            "tokens-per-step {} is not a multiple of the {} tokens of a micro-batch of plan {} at "
            "context {}; give a multiple, or --unequal-tokens",
            tokens, format_count(batch), row.plan, format_count(workload.context)));
      workload.accumulate = (target + batch - 1) / batch;
      if (workload.accumulate > plan::kMostMicroBatches)
        throw UserError(fmt::format(
            "plan {} at context {} takes {} micro-batches of {} tokens for {} tokens a step, and {} is the "
            "most; give fewer --tokens-per-step, more --sequences, or --unequal-tokens",
            row.plan, format_count(workload.context), workload.accumulate, format_count(batch),
            format_count(target), plan::kMostMicroBatches));
      if (target % batch != 0)
        row.warning = fmt::format(
            "plan {} at context {} trains on {} tokens a step, the others on {}: its micro-batch has {}",
            row.plan, format_count(workload.context), batch * workload.accumulate, target, batch);
    }
  }

  void predict_all(std::vector<Row>& rows, std::optional<store::Store>& store,
                   const Invocation& invocation) const {
    Progress progress("predicting");
    search::run(
        rows.size(), search::all_cores(), kNever, [&](size_t i) { return rows[i].scenario; },
        [&](std::vector<search::Outcome>&& finished, size_t done) {
          std::vector<store::RunRecord> records;
          for (search::Outcome& outcome : finished) {
            Row& row = rows[outcome.index];
            if (!outcome.prediction)
              throw UserError(fmt::format("plan {} at context {}: {}", row.plan,
                                          format_count(row.scenario.workload.context), outcome.why_not));
            row.prediction = std::move(*outcome.prediction);
            if (!row.warning.empty()) row.prediction.warnings.push_back(row.warning);
            records.push_back(record(row.key, row.scenario, row.prediction, invocation.command_line));
          }
          if (store) store->insert(records);
          progress.show(done, rows.size());
        });
  }

  void print(const std::vector<Row>& rows, const predict::Scenario& base) const {
    if (flags.json()) {
      std::vector<std::string> objects;
      for (const Row& row : rows) objects.push_back(answer_json(row.scenario, row.prediction));
      fmt::print("{}\n", pretty_array(objects));
      return;
    }
    fmt::print("{} on {} x {} GPUs of {}, {} routing, {}{}, calibration {}\n\n", base.model.name, base.nodes,
               base.used_per_node(), base.cluster.name, plan::describe(base.workload.routing),
               plan::name(base.workload.precision), base.workload.balance_loss ? ", balance loss" : "",
               cost::name(base.calibration));
    TextTable table({"context", "plan", "fits", "HBM/GPU", "host/node", "tokens/step", "step", "tokens/s/GPU",
                     "MFU", "bound by"},
                    "rllrrrrrrl");
    TextTable details({"context", "plan", "micro-batches", "resolved"}, "rlrl");
    std::vector<std::string> warnings, reasons;
    for (const Row& row : rows) {
      const predict::Prediction& p = row.prediction;
      const std::string context = format_count(row.scenario.workload.context);
      table.add({context, row.plan, p.fits ? "yes" : "no", format_bytes(static_cast<double>(p.hbm_peak)),
                 format_bytes(static_cast<double>(p.host_peak)), format_count(p.tokens_per_step),
                 p.step_time ? format_seconds(*p.step_time) : "-",
                 p.step_time ? fmt::format("{:.1f}", p.tokens_per_s_per_gpu) : "-",
                 p.step_time ? percent(p.mfu) : "-", p.bound_by});
      details.add({context, row.plan, std::to_string(row.scenario.workload.accumulate),
                   plan::describe(row.scenario.plan)});
      if (!p.fits) reasons.push_back(fmt::format("{} at {} does not fit: {}", row.plan, context, p.why_not));
      warnings.insert(warnings.end(), p.warnings.begin(), p.warnings.end());
    }
    fmt::print("{}\nmemory: {} of HBM a GPU, {} a node\n\n{}", table.text(),
               format_bytes(base.cluster["hbm_bytes"]), format_bytes(base.cluster["host_bytes"]),
               details.text());
    if (!reasons.empty()) fmt::print("\n");
    for (const std::string& reason : reasons) fmt::print("{}\n", reason);
    fmt::print("{}", warnings_text(warnings));
  }
};

}  // namespace

void add_compare(CLI::App& program, const Invocation& invocation) {
  CLI::App* command = program.add_subcommand("compare", "several plans side by side, over contexts");
  const auto compare = std::make_shared<Compare>(*command);
  command->callback([compare, &invocation] { compare->run(invocation); });
}

}  // namespace mop::cli
