#include "exec/cli/run.h"

#include <fmt/format.h>
#include <unistd.h>

#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

#include "exec/cli/training.h"
#include "sim/base/error.h"
#include "sim/base/paths.h"
#include "sim/base/quantity.h"
#include "sim/cli/answer.h"
#include "sim/cli/flags.h"
#include "sim/cli/text.h"
#include "sim/program/timeline.h"
#include "sim/search/planner.h"

namespace mop::cli {
namespace {

using Json = nlohmann::ordered_json;

// The folder's or file's own config.json, for exports.
std::filesystem::path config_of(const std::string& model) {
  const std::filesystem::path given(model);
  if (std::filesystem::is_directory(given)) return given / "config.json";
  if (std::filesystem::exists(given)) return given;
  return data_home() / "scenarios" / "models" / model / "config.json";
}

double number(const std::string& text, const char* flag) {
  size_t end = 0;
  double value = 0;
  try {
    value = std::stod(text, &end);
  } catch (const std::exception&) {
    end = 0;
  }
  if (end == 0 || end != text.size())
    throw UserError(fmt::format("--{} is '{}', not a number; write it like 3e-4", flag, text));
  return value;
}

struct Run {
  Flags flags;
  const Invocation& invocation;
  TrainingOptions options;
  int64_t ranks = 1, gpus = 0;
  std::string rate = "3e-4", minimum_rate = "0", weight_decay = "0.1", beta1 = "0.9", beta2 = "0.95", eps = "1e-8",
              clip_norm = "1", decay = "cosine", order = "shuffled", export_type = "bf16", trace;
  std::string end_of_document;
  bool dry_run = false, resume = false;

  Run(CLI::App& command, const Invocation& call) : flags(command, Flags::Values::one, {"mop"}), invocation(call) {
    const char* group = "Training";
    command.add_option("--data", options.data_path, "text (its bytes are the tokens), or Megatron .bin and .idx")
        ->type_name("FILE")
        ->group(group);
    command.add_option("--loss-mask", options.data.loss_mask, "indexed dataset of 0 and 1: tokens with 0 are no targets")
        ->type_name("FILE")
        ->group(group);
    command.add_option("--end-of-document", end_of_document, "token put behind every document")->type_name("ID")->group(group);
    command.add_option("--order", order, "of the sequences: shuffled by the seed, or as they are")
        ->type_name("shuffled|data")
        ->default_str(order)
        ->group(group);
    command.add_option("--ranks", ranks, "ranks, threads of this process that stand for GPUs")
        ->type_name("N")
        ->default_str("1")
        ->group(group);
    command.add_option("--gpus", gpus, "ranks on as many GPUs of this host instead (builds with CUDA)")
        ->type_name("N")
        ->default_str("0")
        ->group(group);
    command.add_option("--steps", options.steps, "optimizer steps of the whole run")->default_str("100")->group(group);
    command.add_option("--seed", options.seed, "of weights and of the order of the data")->default_str("0")->group(group);
    command.add_option("--weights", options.weights, "Hugging Face folder to start from; else random")
        ->type_name("DIR")
        ->group(group);
    command.add_option("--lr", rate, "peak learning rate")->default_str(rate)->group(group);
    command.add_option("--min-lr", minimum_rate, "at the end of the cosine")->default_str(minimum_rate)->group(group);
    command.add_option("--lr-decay", decay, "cosine or constant")->default_str(decay)->group(group);
    command.add_option("--warmup", options.trainer.hyper.schedule.warmup, "steps of linear warm-up")
        ->default_str("0")
        ->group(group);
    command.add_option("--weight-decay", weight_decay, "decoupled, of AdamW")->default_str(weight_decay)->group(group);
    command.add_option("--beta1", beta1, "of AdamW")->default_str(beta1)->group(group);
    command.add_option("--beta2", beta2, "of AdamW")->default_str(beta2)->group(group);
    command.add_option("--eps", eps, "of AdamW")->default_str(eps)->group(group);
    command.add_option("--clip-norm", clip_norm, "largest global gradient norm; --clip off does not clip")
        ->default_str(clip_norm)
        ->group(group);
    command.add_option("--save", options.save, "folder of checkpoints")->type_name("DIR")->group(group);
    command.add_option("--save-every", options.save_every, "steps between checkpoints; 0: the last step only")
        ->default_str("0")
        ->group(group);
    command.add_option("--keep", options.keep, "checkpoints that remain")->default_str("2")->group(group);
    command.add_flag("--resume", resume, "go on from the newest checkpoint in --save, whatever its plan and ranks")
        ->group(group);
    command.add_option("--export", options.export_folder, "Hugging Face folder to write at the end")
        ->type_name("DIR")
        ->group(group);
    command.add_option("--export-type", export_type, "bf16 or f32")->default_str(export_type)->group(group);
    command.add_option("--trace", trace, "timeline of the last step for Perfetto or chrome://tracing")
        ->type_name("FILE")
        ->group("Answer");
    command.add_flag("--dry-run", dry_run, "show memory and predicted schedule, and run nothing")->group("Answer");
    command.footer(
        "Plan settings have flags of their own, such as --ep 8; mop show plan --help lists them.\n"
        "The cluster is the one that the planner plans for and that the stored prediction is of.\n"
        "Example:\n"
        "  mop run --model tiny-qwen3-moe --data README.md --plan mop --ranks 8 --steps 200\n"
        "  mop run --model tiny-qwen3-moe --data README.md --ranks 2 --steps 50 --save ckpt --resume --format json");
  }

  predict::Scenario scenario() {
    predict::Scenario s = flags.scenario();
    if (gpus < 0) throw UserError(fmt::format("--gpus is {}; it cannot be negative", gpus));
    if (gpus > 0) {
      if (ranks != 1 && ranks != gpus) throw UserError("--ranks and --gpus differ; give one of them");
      ranks = gpus;
      options.on_gpus = true;
    }
    if (ranks < 1) throw UserError(fmt::format("--ranks is {}; at least one is needed", ranks));
    if (flags.given("nodes") || flags.given("gpus-per-node"))
      throw UserError("--nodes and --gpus-per-node are for predictions; mop run takes --ranks");
    const int64_t node = s.cluster.gpus_per_node();
    if (ranks > node && ranks % node != 0)
      throw UserError(fmt::format("--ranks is {}, more than one node of {} with {} GPUs and no multiple of it; take a "
                                  "multiple, or another --cluster",
                                  ranks, s.cluster.name, node));
    s.nodes = std::max<int64_t>(1, ranks / node);
    s.gpus_per_node = std::min(ranks, node);
    if (!flags.given("context") && s.model.max_positions > 0)
      s.workload.context = std::min(s.workload.context, s.model.max_positions);
    if (s.plan.family == plan::Family::fsdp2 && s.plan.runtime != plan::Runtime::native) {
      s.plan.runtime = plan::Runtime::native;
      note("fsdp2 runs with our own kernels: runtime=native (mop simulate predicts PyTorch's)");
      if (s.plan.tensor != 1 || s.plan.context != 1)
        note("tp and cp: our kernels share the sequence over as many ranks by Ulysses, and split no weight");
    }
    return s;
  }

  void note(const std::string& text) const { fmt::print(stderr, "mop: {}\n", text); }

  void complete(const predict::Scenario& s) {
    train::Hyperparameters& h = options.trainer.hyper;
    h.schedule.peak = number(rate, "lr");
    h.schedule.minimum = number(minimum_rate, "min-lr");
    if (decay != "cosine" && decay != "constant")
      throw UserError(fmt::format("--lr-decay is '{}'; write cosine or constant", decay));
    h.schedule.decay = decay == "cosine" ? train::Decay::cosine : train::Decay::constant;
    h.schedule.steps = options.steps;
    h.weight_decay = number(weight_decay, "weight-decay");
    h.beta1 = number(beta1, "beta1");
    h.beta2 = number(beta2, "beta2");
    h.eps = number(eps, "eps");
    h.max_norm = number(clip_norm, "clip-norm");
    if (options.steps < 1) throw UserError(fmt::format("--steps is {}; at least one is needed", options.steps));
    for (const double beta : {h.beta1, h.beta2})
      if (!(beta >= 0 && beta < 1)) throw UserError("--beta1 and --beta2 are at least 0 and below 1");
    if (!(h.max_norm > 0)) throw UserError(fmt::format("--clip-norm is {}; it must be above 0", clip_norm));
    if (!(h.eps > 0)) throw UserError(fmt::format("--eps is {}; it must be above 0", eps));
    if (!(h.weight_decay >= 0)) throw UserError(fmt::format("--weight-decay is {}; it cannot be negative", weight_decay));
    if (options.keep < 1) throw UserError("--keep must be at least 1");
    if (options.save_every < 0) throw UserError("--save-every cannot be negative");
    if (options.save_every > 0 && options.save.empty())
      throw UserError("--save-every needs a folder; add --save DIR");
    if (resume && options.save.empty()) throw UserError("--resume goes on from the checkpoints in --save; add --save DIR");
    if (resume) options.resume = options.save;
    if (order != "shuffled" && order != "data")
      throw UserError(fmt::format("--order is '{}'; write shuffled or data", order));
    if (export_type != "bf16" && export_type != "f32")
      throw UserError(fmt::format("--export-type is '{}'; write bf16 or f32", export_type));
    options.export_type = export_type == "bf16" ? weights::Type::bf16 : weights::Type::f32;
    options.config_json = config_of(flags.text("model"));
    options.data.context = s.workload.context;
    options.data.vocab = s.model.vocab;
    options.data.seed = options.seed;
    options.data.shuffle = order == "shuffled";
    if (!end_of_document.empty())
      options.data.end_of_document = static_cast<int32_t>(number(end_of_document, "end-of-document"));
    options.trainer.trace = true;
  }

  std::string memory_line(const train::Prepared& p) const {
    return fmt::format("{} of HBM and {} of host memory a rank, {} operations a step\n",
                       format_bytes(static_cast<double>(p.memory.arenas.hbm.bytes)),
                       format_bytes(static_cast<double>(p.memory.arenas.host.bytes)), p.program.ops.size());
  }

  void print_step(const predict::Scenario& s, const train::StepReport& r, int64_t tokens, int64_t bytes) const {
    const double per_second = static_cast<double>(tokens) / r.seconds,
                 exposed = static_cast<double>(r.overlap.exposed_communication) * 1e-9;
    if (flags.json()) {
      Json line{{"step", r.step + 1}, {"loss", r.loss}};
      if (s.workload.balance_loss) line["balance_loss"] = r.balance_loss;
      line["gradient_norm"] = r.gradient_norm ? Json(*r.gradient_norm) : Json();
      line["learning_rate"] = r.learning_rate;
      line["tokens_per_s"] = per_second;
      line["hbm_bytes"] = bytes;
      line["exposed_communication_s"] = exposed;
      line["seconds"] = r.seconds;
      fmt::print("{}\n", line.dump());
    } else {
      fmt::print("step {:>5}  loss {:>9.5f}  grad norm {:>9}  lr {:.3e}  {:>9.0f} tokens/s  {}  {} exposed\n", r.step + 1,
                 r.loss, r.gradient_norm ? fmt::format("{:.4f}", *r.gradient_norm) : "-", r.learning_rate, per_second,
                 format_bytes(static_cast<double>(bytes)), format_seconds(exposed));
    }
    std::fflush(stdout);
  }

  store::RunRecord measurement(const predict::Scenario& s, store::RunRecord r, const TrainingReport& report) const {
    r.kind = store::kMeasurement;
    r.created = store::now_utc();
    char host[256] = "unknown";
    ::gethostname(host, sizeof host - 1);
    r.cluster = options.on_gpus ? "gpus" : "cpu";
    r.machine = fmt::format("{}: {} backend, {} ranks, {} hardware threads", host, options.on_gpus ? "CUDA" : "CPU",
                            s.gpus(), std::thread::hardware_concurrency());
    r.fits = true;
    r.hbm_allocated_bytes = report.hbm_addressed;
    r.hbm_peak_bytes = report.hbm_bytes;
    r.hbm_capacity_bytes = std::nullopt;
    r.host_peak_bytes = report.host_bytes * s.gpus();
    r.host_capacity_bytes = std::nullopt;
    const double seconds = report.median_seconds();
    r.step_time_s = seconds;
    r.tokens_per_step = report.tokens_per_step;
    r.tokens_per_s_per_gpu = static_cast<double>(report.tokens_per_step) / seconds / static_cast<double>(s.gpus());
    r.mfu = std::nullopt;
    r.exposed_communication_s = report.mean_exposed_seconds();
    r.bound_by = "";
    Json steps = Json::array();
    for (const train::StepReport& step : report.steps)
      steps.push_back({{"step", step.step + 1},
                       {"loss", step.loss},
                       {"gradient_norm", step.gradient_norm ? Json(*step.gradient_norm) : Json()},
                       {"learning_rate", step.learning_rate},
                       {"seconds", step.seconds}});
    r.detail = Json{{"backend", options.on_gpus ? "cuda" : "cpu"},
                    {"ranks", s.gpus()},
                    {"data", options.data_path},
                    {"seed", options.seed},
                    {"workspace_bytes", report.workspace_bytes},
                    {"step_time", "median of the second half of the steps"},
                    {"steps", steps}}
                   .dump();
    return r;
  }

  void write_trace(const predict::Scenario& s, const train::Prepared& prepared, const train::Trainer& trainer) const {
    std::vector<program::RankTimeline> timelines;
    for (int rank = 0; rank < static_cast<int>(s.gpus()); ++rank)
      timelines.push_back({fmt::format("rank {}, {} {}, measured", rank, s.model.name,
                                       plan::family_name(s.plan.family)),
                           &prepared.program, trainer.trace(rank)});
    program::write_timeline(trace, timelines);
  }

  void run() {
    flags.read_file();
    predict::Scenario s = scenario();
    complete(s);
    predict::validate(s);
    if (options.data_path.empty() && !dry_run)
      throw UserError("no data is given; write --data FILE (text, or the .bin of an indexed dataset)");
    std::optional<store::Store> store = flags.open_store();
    const std::string key = keys_of(s).key;
    {
      Progress progress("choosing the plan");
      s.plan = search::choose(s, [&](size_t done, size_t total) { progress.show(done, total); });
    }
    const predict::Prediction p = predict::predict(s);
    options.trainer.check_finite = !options.on_gpus;  // a few percent of a step on the CPU
    const train::Prepared prepared({s.model, s.plan, s.gpus(), s.workload});
    if (dry_run) {
      fmt::print("{}", flags.json() ? pretty(answer_json(s, p)) + "\n" : answer_text(s, p) + "\nCPU backend: " + memory_line(prepared));
      return;
    }
    store::RunRecord predicted = record(key, s, p, invocation.command_line);
    if (store) store->insert(predicted);
    if (!flags.json()) fmt::print("{}plan {}\n{}", headline(s), plan::describe(s.plan), memory_line(prepared));

    TrainingObserver observer;
    observer.say = [this](const std::string& text) { note(text); };
    const int64_t tokens = predict::tokens_per_step(s), bytes = prepared.memory.arenas.hbm.bytes;
    observer.step = [&](const train::StepReport& step) { print_step(s, step, tokens, bytes); };
    observer.end = [&](const train::Trainer& trainer) {
      if (!trace.empty()) write_trace(s, prepared, trainer);
    };
    const TrainingReport report = run_training(prepared, options, observer);
    if (store && !report.steps.empty()) store->insert(measurement(s, predicted, report));
    if (report.interrupted)
      throw Interrupted{options.save.empty()
                            ? fmt::format("interrupted after step {}; nothing is saved without --save",
                                          report.steps.back().step + 1)
                            : fmt::format("interrupted after step {}; the same command with --resume goes on",
                                          report.steps.back().step + 1)};
    if (!trace.empty()) note(fmt::format("timeline in {}; open it at https://ui.perfetto.dev", trace));
  }
};

}  // namespace

void add_run(CLI::App& program, const Invocation& invocation) {
  CLI::App* command = program.add_subcommand("run", "train under a plan, and measure");
  const auto run = std::make_shared<Run>(*command, invocation);
  command->callback([run] { run->run(); });
}

}  // namespace mop::cli
