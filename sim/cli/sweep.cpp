#include "sim/search/sweep.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <memory>
#include <unordered_map>

#include "sim/base/error.h"
#include "sim/cli/answer.h"
#include "sim/cli/commands.h"
#include "sim/cli/flags.h"
#include "sim/cli/stop_on_signal.h"
#include "sim/cli/sweep_rows.h"
#include "sim/cli/text.h"
#include "sim/search/parallel.h"
#include "sim/search/settings.h"

namespace mop::cli {
namespace {

struct Sweep {
  Flags flags;
  std::string csv, name = "sweep";
  bool resume = false;
  unsigned jobs = search::all_cores();

  explicit Sweep(CLI::App& command) : flags(command, Flags::Values::all, {"mop"}) {
    const auto option = [&](CLI::Option* o) { o->group("Sweep"); };
    option(command.add_option("--csv", csv, "write the rows to this file, in the order of the combinations")
               ->type_name("FILE"));
    option(command.add_option("--name", name, "name of the sweep in the database")
               ->type_name("NAME")
               ->default_str(name));
    option(command.add_flag("--resume", resume,
                            "keep the rows that the database has of this sweep, compute the others"));
    option(command.add_option("--jobs", jobs, "threads; default: all cores")
               ->type_name("N")
               ->check(CLI::Range(1u, 4096u)));
    command.footer(
        "Every plan setting is a flag that takes a list or range too (mop show plan --help); --plan is "
        "repeated.\n"
        "Combinations that are not possible are skipped and counted.\n"
        "Example:\n"
        "  mop sweep --model kimi-k2 --context 32K..1M --nodes 4,8,12 --ulysses 8..64 --csv kimi.csv\n"
        "  mop sweep --model kimi-k2 --context 32K..1M --nodes 4,8,12 --ulysses 8..64 --csv kimi.csv "
        "--resume");
  }

  search::Sweep make() const {
    flags.check_knobs();
    search::Sweep sweep;
    // Axes start at their first value; what is not swept is read once and shared by all points.
    std::vector<std::string> swept{"plan"};
    constexpr std::array kLists{"nodes", "context", "sequences", "accumulate", "precision", "balance-loss"};
    swept.insert(swept.end(), kLists.begin(), kLists.end());
    swept.emplace_back("routing");
    sweep.base = flags.scenario(swept);
    sweep.axes.push_back({"plan", flags.plans()});
    for (const char* setting : kLists)
      sweep.axes.push_back({setting, search::expand_range(flags.text(setting), setting)});
    sweep.axes.push_back({"routing", search::split_routings(flags.text("routing"))});
    for (const plan::Knob& knob : plan::knobs())
      if (const auto given = flags.knobs().find(knob.name);
          given != flags.knobs().end() && std::ranges::all_of(flags.plans(), [&](const std::string& plan) {
            return flags.counts(plan, knob.name);
          }))
        sweep.axes.push_back({knob.name, search::expand_range(given->second, knob.name)});
    return sweep;
  }

  void run(const Invocation& invocation) {
    flags.read_file();
    const search::Sweep sweep = make();
    const size_t count = search::count_points(sweep);
    std::optional<store::Store> store = flags.open_store();
    if (resume && !store) throw UserError("--resume needs the database of the sweep; drop --no-store");
    if (!csv.empty()) check_csv();

    // A combination asked twice (a setting that its plan lacks) is one.
    std::vector<std::string> keys;
    std::unordered_map<std::string, size_t> place;
    std::vector<size_t> points;
    for (size_t i = 0; i < count; ++i) {
      std::string key = keys_of(search::point(sweep, i)).key;
      if (!place.emplace(key, points.size()).second) continue;
      keys.push_back(std::move(key));
      points.push_back(i);
    }
    std::vector<std::optional<store::RunRecord>> rows(points.size());
    if (resume)
      for (store::RunRecord& known : store->query({.where = {"sweep=" + name, "kind=prediction"}}))
        if (const auto found = place.find(known.key); found != place.end())
          rows[found->second] = std::move(known);
    std::vector<size_t> open;
    for (size_t i = 0; i < rows.size(); ++i)
      if (!rows[i]) open.push_back(i);

    size_t skipped = 0, first_skipped = rows.size();
    std::string reason;
    {
      const StopOnSignal guard;
      Progress progress("sweep");
      search::run(
          open.size(), jobs, StopOnSignal::stop,
          [&](size_t i) { return search::point(sweep, points[open[i]]); },
          [&](std::vector<search::Outcome>&& finished, size_t done) {
            std::vector<store::RunRecord> records;
            for (const search::Outcome& outcome : finished) {
              const size_t at = open[outcome.index];
              if (outcome.prediction) {
                records.push_back(
                    record(keys[at], outcome.scenario, *outcome.prediction, invocation.command_line, name));
                rows[at] = records.back();
              } else {
                ++skipped;
                if (at < first_skipped) first_skipped = at, reason = outcome.why_not;
              }
            }
            if (store) store->insert(records);
            progress.show(done, open.size());
          });
    }
    std::vector<store::RunRecord> finished;
    for (std::optional<store::RunRecord>& row : rows)
      if (row) finished.push_back(std::move(*row));
    if (!csv.empty()) write_csv(finished);
    if (finished.size() + skipped < rows.size())
      throw Interrupted{interruption(finished.size(), rows.size(), store.has_value())};
    if (finished.empty())
      throw UserError(
          fmt::format("none of the {} combinations is possible; the first: {}", rows.size(), reason));
    if (flags.json())
      print_json(finished);
    else
      print_table(finished, rows.size() - open.size(), skipped, reason, store.has_value());
    if (flags.json() && skipped > 0)
      fmt::print(stderr, "mop: skipped {} of {} combinations; the first: {}\n", skipped, rows.size(), reason);
  }

  std::string interruption(size_t finished, size_t total, bool stored) const {
    return stored ? fmt::format(
                        "interrupted: {} of {} rows are in {}; the same command with --resume computes the "
                        "others",
                        finished, total, flags.database())
                  : fmt::format("interrupted after {} of {} rows; without a database nothing can be resumed",
                                finished, total);
  }

  [[noreturn]] void csv_fails() const {
    throw UserError(fmt::format("CSV file '{}' cannot be written: {}", csv, std::strerror(errno)));
  }

  void check_csv() const {
    if (!std::ofstream(csv, std::ios::app)) csv_fails();
  }

  void write_csv(const std::vector<store::RunRecord>& rows) const {
    std::ofstream file(csv);
    if (!file) csv_fails();
    std::vector<std::string> knobs;
    for (const auto& [knob, values] : flags.knobs()) knobs.push_back(knob);
    file << sweep_csv(rows, knobs);
    if (!file.flush()) csv_fails();
  }

  static void print_json(const std::vector<store::RunRecord>& rows) {
    std::vector<std::string> objects;
    for (const store::RunRecord& row : rows) objects.push_back(row.detail);
    fmt::print("{}\n", pretty_array(objects));
  }

  void print_table(const std::vector<store::RunRecord>& rows, size_t kept, size_t skipped,
                   const std::string& reason, bool stored) const {
    const auto fitting = std::ranges::count_if(rows, &store::RunRecord::fits);
    fmt::print("{} rows, {} of them fit", rows.size(), fitting);
    if (kept > 0) fmt::print("; {} were there already", kept);
    fmt::print("\n");
    if (skipped > 0) fmt::print("{} combinations skipped; the first: {}\n", skipped, reason);
    if (fitting > 0) fmt::print("\nthe fastest:\n{}\n", fastest_table(rows, 10));
    if (!csv.empty()) fmt::print("rows in {}\n", csv);
    if (stored)
      fmt::print("rows in {}; mop results --db {} --where sweep={} lists them\n", flags.database(),
                 flags.database(), name);
  }
};

}  // namespace

void add_sweep(CLI::App& program, const Invocation& invocation) {
  CLI::App* command = program.add_subcommand("sweep", "every combination of ranges, into SQLite and CSV");
  const auto sweep = std::make_shared<Sweep>(*command);
  command->callback([sweep, &invocation] { sweep->run(invocation); });
}

}  // namespace mop::cli
