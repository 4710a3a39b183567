#include "exec/cli/run.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <thread>

#include "exec/cli/training.h"
#include "exec/launch/spawn.h"
#include "sim/base/error.h"
#include "sim/base/quantity.h"
#include "sim/cli/answer.h"
#include "sim/cli/flags.h"
#include "sim/cli/text.h"
#include "sim/model/config.h"
#include "sim/program/timeline.h"
#include "sim/search/planner.h"
#include "sim/validate/host_memory.h"
#include "sim/validate/op_sums.h"
#include "sim/validate/question.h"

namespace mop::cli {
namespace {

using Json = nlohmann::ordered_json;

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
  std::string rate = "3e-4", minimum_rate = "0", weight_decay = "0.1", beta1 = "0.9", beta2 = "0.95",
              eps = "1e-8", clip_norm = "1", decay = "cosine", order = "shuffled", export_type = "bf16",
              trace, label;
  std::string config;                    // of the model, as the run found it
  std::optional<validate::OpSums> sums;  // of the last profiled step; in process 0
  std::string end_of_document, profile_steps;
  bool dry_run = false, resume = false, check_finite = false;

  Run(CLI::App& command, const Invocation& call)
      : flags(command, Flags::Values::one, {"mop"}), invocation(call) {
    const char* group = "Training";
    command
        .add_option("--data", options.data_path, "text (its bytes are the tokens), or Megatron .bin and .idx")
        ->type_name("FILE")
        ->group(group);
    command
        .add_option("--loss-mask", options.data.loss_mask,
                    "indexed dataset of 0 and 1: tokens with 0 are no targets")
        ->type_name("FILE")
        ->group(group);
    command.add_option("--end-of-document", end_of_document, "token put behind every document")
        ->type_name("ID")
        ->group(group);
    command.add_option("--order", order, "of the sequences: shuffled by the seed, or as they are")
        ->type_name("shuffled|data")
        ->default_str(order)
        ->group(group);
    command.add_option("--ranks", ranks, "ranks, threads of this process that stand for GPUs")
        ->type_name("N")
        ->default_str("1")
        ->group(group);
    command
        .add_option(
            "--gpus", gpus,
            "ranks on as many GPUs of this host instead, a process each; under torchrun, mpirun or srun the "
            "launcher says how many")
        ->type_name("N")
        ->default_str("0")
        ->group(group);
    command.add_option("--steps", options.steps, "optimizer steps of the whole run")
        ->default_str("100")
        ->group(group);
    command.add_option("--seed", options.seed, "of weights and of the order of the data")
        ->default_str("0")
        ->group(group);
    command.add_option("--weights", options.weights, "Hugging Face folder to start from; else random")
        ->type_name("DIR")
        ->group(group);
    command.add_option("--lr", rate, "peak learning rate")->default_str(rate)->group(group);
    command.add_option("--min-lr", minimum_rate, "at the end of the cosine")
        ->default_str(minimum_rate)
        ->group(group);
    command.add_option("--lr-decay", decay, "cosine or constant")->default_str(decay)->group(group);
    command.add_option("--warmup", options.trainer.hyper.schedule.warmup, "steps of linear warm-up")
        ->default_str("0")
        ->group(group);
    command.add_option("--weight-decay", weight_decay, "decoupled, of AdamW")
        ->default_str(weight_decay)
        ->group(group);
    command.add_option("--beta1", beta1, "of AdamW")->default_str(beta1)->group(group);
    command.add_option("--beta2", beta2, "of AdamW")->default_str(beta2)->group(group);
    command.add_option("--eps", eps, "of AdamW")->default_str(eps)->group(group);
    command.add_option("--clip-norm", clip_norm, "largest global gradient norm; --clip off does not clip")
        ->default_str(clip_norm)
        ->group(group);
    command.add_option("--save", options.save, "folder of checkpoints")->type_name("DIR")->group(group);
    command
        .add_option("--save-every", options.save_every, "steps between checkpoints; 0: the last step only")
        ->default_str("0")
        ->group(group);
    command.add_option("--keep", options.keep, "checkpoints that remain")->default_str("2")->group(group);
    command
        .add_flag("--resume", resume,
                  "go on from the newest checkpoint in --save, whatever its plan and ranks")
        ->group(group);
    command.add_option("--export", options.export_folder, "Hugging Face folder to write at the end")
        ->type_name("DIR")
        ->group(group);
    command.add_option("--export-type", export_type, "bf16 or f32")->default_str(export_type)->group(group);
    command.add_option("--trace", trace, "timeline of the last step for Perfetto or chrome://tracing")
        ->type_name("FILE")
        ->group("Answer");
    command
        .add_option("--profile-steps", profile_steps,
                    "steps whose operations CUPTI times, or that an attached profiler records; --trace has "
                    "the last of them; else the last")
        ->type_name("N|FIRST..LAST")
        ->group("Answer");
    command
        .add_option("--label", label, "what the stored measurement is called: mop results --where label=NAME")
        ->type_name("NAME")
        ->group("Answer");
    command
        .add_flag("--check-finite", check_finite,
                  "name the first operation that makes a number that is not finite; always so on the CPU, on "
                  "GPUs every "
                  "result is read once more")
        ->group("Answer");
    command.add_flag("--dry-run", dry_run, "show memory and predicted schedule, and run nothing")
        ->group("Answer");
    command.footer(
        "Plan settings have flags of their own, such as --ep 8; mop show plan --help lists them.\n"
        "The cluster is the one that the planner plans for and that the stored prediction is of. Without "
        "--context a sequence has 4096 tokens, or as many as the model has positions.\n"
        "On several hosts: torchrun --no-python, mpirun or srun start a process a GPU, each with this same "
        "command.\n"
        "Example:\n"
        "  mop run --model tiny-qwen3-moe --data README.md --plan mop --ranks 8 --steps 200\n"
        "  mop run --model qwen3-30b-a3b --data corpus.bin --cluster h200x4 --plan mop --gpus 4 --sequences "
        "8\n"
        "  mop run --model tiny-qwen3-moe --data README.md --ranks 2 --steps 50 --save ckpt --save-every 10 "
        "--format json\n"
        "The last one again with --resume goes on from the newest checkpoint in ckpt.");
  }

  predict::Scenario scenario() {
    predict::Scenario s = flags.scenario();
    if (gpus < 0) throw UserError(fmt::format("--gpus is {}; it cannot be negative", gpus));
    if (gpus > 0 && ranks != 1 && ranks != gpus)
      throw UserError("--ranks and --gpus differ; give one of them");
    options.place = launch::place_of([](const char* name) -> const char* { return std::getenv(name); });
    if (options.place && options.place->size == 1 && gpus == 0) options.place.reset();  // a launcher's shell
    if (options.place && (gpus > 0 || ranks > 1) && std::max(gpus, ranks) != options.place->size)
      throw UserError(fmt::format("{} started {} ranks, and --{} says {}; leave it out",
                                  options.place->launcher, options.place->size, gpus > 0 ? "gpus" : "ranks",
                                  std::max(gpus, ranks)));
    if (options.place)
      ranks = options.place->size;
    else if (gpus > 0)
      ranks = gpus;
    if (gpus == 1 && !options.place) options.place.emplace();
    if (ranks < 1) throw UserError(fmt::format("--ranks is {}; at least one is needed", ranks));
    if (flags.given("nodes") || flags.given("gpus-per-node"))
      throw UserError("--nodes and --gpus-per-node are for predictions; mop run takes --ranks");
    const int64_t node = s.cluster.gpus_per_node();
    if (ranks > node && ranks % node != 0)
      throw UserError(
          fmt::format("--ranks is {}, more than one node of {} with {} GPUs and no multiple of it; take a "
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

  bool first() const { return !options.place || options.place->rank == 0; }
  bool on_gpus() const { return options.place.has_value(); }
  void note(const std::string& text) const {
    if (first()) fmt::print(stderr, "mop: {}\n", text);
  }

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
    if (options.steps < 1)
      throw UserError(fmt::format("--steps is {}; at least one is needed", options.steps));
    for (const double beta : {h.beta1, h.beta2})
      if (!(beta >= 0 && beta < 1)) throw UserError("--beta1 and --beta2 are at least 0 and below 1");
    if (!(h.max_norm > 0)) throw UserError(fmt::format("--clip-norm is {}; it must be above 0", clip_norm));
    if (!(h.eps > 0)) throw UserError(fmt::format("--eps is {}; it must be above 0", eps));
    if (!(h.weight_decay >= 0))
      throw UserError(fmt::format("--weight-decay is {}; it cannot be negative", weight_decay));
    if (options.keep < 1) throw UserError("--keep must be at least 1");
    if (options.save_every < 0) throw UserError("--save-every cannot be negative");
    if (options.save_every > 0 && options.save.empty())
      throw UserError("--save-every needs a folder; add --save DIR");
    if (resume && options.save.empty())
      throw UserError("--resume goes on from the checkpoints in --save; add --save DIR");
    if (resume) options.resume = options.save;
    if (order != "shuffled" && order != "data")
      throw UserError(fmt::format("--order is '{}'; write shuffled or data", order));
    if (export_type != "bf16" && export_type != "f32")
      throw UserError(fmt::format("--export-type is '{}'; write bf16 or f32", export_type));
    options.export_type = export_type == "bf16" ? weights::Type::bf16 : weights::Type::f32;
    options.config_json = model::config_path(flags.text("model"));  // for exports
    config = model::config_text(flags.text("model"));
    options.data.context = s.workload.context;
    options.data.vocab = s.model.vocab;
    options.data.seed = options.seed;
    options.data.shuffle = order == "shuffled";
    if (!end_of_document.empty())
      options.data.end_of_document = static_cast<int32_t>(number(end_of_document, "end-of-document"));
    options.trainer.trace = true;
    options.profile_first = options.profile_last = options.steps - 1;
    if (!profile_steps.empty()) {
      const size_t dots = profile_steps.find("..");
      options.profile_first =
          static_cast<int64_t>(number(profile_steps.substr(0, dots), "profile-steps")) - 1;
      options.profile_last =
          dots == std::string::npos
              ? options.profile_first
              : static_cast<int64_t>(number(profile_steps.substr(dots + 2), "profile-steps")) - 1;
      if (options.profile_first < 0 || options.profile_last < options.profile_first ||
          options.profile_last >= options.steps)
        throw UserError(fmt::format("--profile-steps is '{}'; it takes steps from 1 to {}, like 3 or 3..5",
                                    profile_steps, options.steps));
    }
  }

  std::string memory_line(const train::Prepared& p) const {
    return fmt::format("{} of HBM and {} of host memory a rank, {} operations a step\n",
                       format_bytes(static_cast<double>(p.memory.arenas.hbm.bytes)),
                       format_bytes(static_cast<double>(p.memory.arenas.host.bytes)), p.program.ops.size());
  }

  // Model FLOPs a second and GPU, by the formula that formula() prints, and their share of the peak.
  static double flops_rate(const predict::Scenario& s, double tokens_per_second) {
    return tokens_per_second / static_cast<double>(s.gpus()) * predict::model_flops(s).total();
  }
  static double mfu(const predict::Scenario& s, double tokens_per_second) {
    return flops_rate(s, tokens_per_second) / s.cluster["peak_flops"];
  }
  static std::string formula(const predict::Scenario& s) {
    return fmt::format(
        "model FLOPs: {:.3g} GFLOP a token, forward and backward: products of active parameters without the "
        "input embedding, causal attention halved, true windows, no recompute; MFU against {:.0f} TFLOP/s\n",
        predict::model_flops(s).total() * 1e-9, s.cluster["peak_flops"] * 1e-12);
  }

  void print_step(const predict::Scenario& s, const train::StepReport& r, int64_t tokens,
                  int64_t bytes) const {
    const double per_second = static_cast<double>(tokens) / r.seconds,
                 per_gpu = per_second / static_cast<double>(s.gpus()),
                 exposed = static_cast<double>(r.overlap.exposed_communication) * 1e-9;
    const auto slowest = std::ranges::min_element(r.clocks_hz);
    if (flags.json()) {
      Json line{{"step", r.step + 1}, {"loss", r.loss}};
      if (s.workload.balance_loss) line["balance_loss"] = r.balance_loss;
      line["gradient_norm"] = r.gradient_norm ? Json(*r.gradient_norm) : Json();
      line["learning_rate"] = r.learning_rate;
      line["tokens_per_s"] = per_second;
      line["hbm_bytes"] = bytes;
      line["expert_imbalance"] = r.expert_imbalance;
      line["exposed_communication_s"] = exposed;
      line["planning_stall_s"] = static_cast<double>(r.overlap.planning_stall) * 1e-9;
      if (on_gpus()) {
        line["tokens_per_s_per_gpu"] = per_gpu;
        line["model_flops_per_s_per_gpu"] = flops_rate(s, per_second);
        line["mfu"] = mfu(s, per_second);
        line["clock_hz"] = r.clock_hz > 0 ? Json(r.clock_hz) : Json();
        line["lowest_clock_hz"] = *slowest > 0 ? Json(*slowest) : Json();
        line["lowest_clock_rank"] = *slowest > 0 ? Json(slowest - r.clocks_hz.begin()) : Json();
      }
      line["seconds"] = r.seconds;
      fmt::print("{}\n", line.dump());
    } else {
      const std::string speed =
          on_gpus()
              ? fmt::format("{:>8.0f} tokens/s/GPU  {:>4.0f} TFLOP/s  MFU {:.1f} %  {:.2f} GHz", per_gpu,
                            flops_rate(s, per_second) * 1e-12, 100 * mfu(s, per_second), *slowest * 1e-9)
              : fmt::format("{:>9.0f} tokens/s", per_second);
      fmt::print(
          "step {:>5}  loss {:>9.5f}  grad norm {:>9}  lr {:.3e}  {}  {}  rows/expert {:.2f}x  {} exposed\n",
          r.step + 1, r.loss, r.gradient_norm ? fmt::format("{:.4f}", *r.gradient_norm) : "-",
          r.learning_rate, speed, format_bytes(static_cast<double>(bytes)), r.expert_imbalance,
          format_seconds(exposed));
    }
    std::fflush(stdout);
  }

  store::RunRecord measurement(const predict::Scenario& s, store::RunRecord r,
                               const TrainingReport& report) const {
    r.kind = store::kMeasurement;
    r.label = label;
    r.created = store::now_utc();
    char host[256] = "unknown";
    ::gethostname(host, sizeof host - 1);
    if (!on_gpus()) r.cluster = "cpu";  // and not the one that the prediction is of
    r.machine = fmt::format("{}: {} backend, {} ranks, {} hardware threads a process{}", host,
                            on_gpus() ? "CUDA" : "CPU", s.gpus(), std::thread::hardware_concurrency(),
                            report.libraries.empty() ? "" : ", " + report.libraries);
    r.fits = true;
    r.hbm_allocated_bytes = report.hbm_addressed;
    r.hbm_peak_bytes = on_gpus() ? report.device_bytes : report.hbm_bytes;
    r.hbm_capacity_bytes = std::nullopt;
    r.host_peak_bytes = report.host_bytes * s.used_per_node();
    r.host_capacity_bytes = std::nullopt;
    const double seconds = report.median_seconds();
    r.step_time_s = seconds;
    r.tokens_per_step = report.tokens_per_step;
    r.tokens_per_s_per_gpu =
        static_cast<double>(report.tokens_per_step) / seconds / static_cast<double>(s.gpus());
    r.mfu = on_gpus() ? std::optional(mfu(s, static_cast<double>(report.tokens_per_step) / seconds))
                      : std::nullopt;
    r.exposed_communication_s = report.mean_exposed_seconds();
    r.bound_by = "";
    Json steps = Json::array();
    for (const train::StepReport& step : report.steps)
      steps.push_back(
          {{"step", step.step + 1},
           {"loss", step.loss},
           {"gradient_norm", step.gradient_norm ? Json(*step.gradient_norm) : Json()},
           {"learning_rate", step.learning_rate},
           {"expert_imbalance", step.expert_imbalance},
           {"clock_hz", step.clock_hz},
           {"clocks_hz", step.clocks_hz},
           {"planning_stall_s", static_cast<double>(step.overlap.planning_stall) * 1e-9},
           {"exposed_communication_s", static_cast<double>(step.overlap.exposed_communication) * 1e-9},
           {"seconds", step.seconds}});
    Json detail{{"backend", on_gpus() ? "cuda" : "cpu"},
                {"ranks", s.gpus()},
                {"data", options.data_path},
                {"seed", options.seed},
                {"workspace_bytes", report.workspace_bytes},
                {"step_time", "median of the second half of the steps"},
                {"steps", steps}};
    // Of process 0 in the last step; dense layers have none.
    Json rows = Json::array();
    for (const std::vector<int64_t>& layer : report.expert_rows)
      if (!layer.empty()) rows.push_back(layer);
    detail[validate::kExpertRows] = std::move(rows);
    detail[validate::kQuestion] =
        Json::parse(validate::to_json(s, flags.text("model"), config, flags.text("cluster")));
    if (const validate::HostMemory found = host_memory(report.host_rates); found.gpus > 0)
      detail[validate::kHostMemory] = Json::parse(validate::to_json(found));
    const auto last = std::ranges::find(report.steps, options.profile_last, &train::StepReport::step);
    if (sums && last != report.steps.end()) {
      validate::OpSums of_step = *sums;
      of_step.step = last->seconds;
      detail[validate::kOpSums] = Json::parse(validate::to_json(of_step));
      detail["profiled_step"] = last->step + 1;
      if (!trace.empty()) detail["trace"] = trace;
    }
    r.detail = detail.dump(-1, ' ', false, Json::error_handler_t::replace);
    return r;
  }

  // gpus is 0 where nothing was measured.
  validate::HostMemory host_memory(std::span<const host::Rates> rates) const {
    validate::HostMemory found;
    for (const host::Rates& one : rates) {
      if (one.both_ways > 0) found.both_ways.push_back(one.both_ways);
      if (one.adam > 0) found.adam.push_back(one.adam);
    }
    if (!found.both_ways.empty() || !found.adam.empty()) found.gpus = options.place->local_size;
    return found;
  }

  // Others may use the host's memory, or the cluster's file may be of another host.
  void tell_host_memory(const host::Rates& rates, const cluster::ClusterModel& cluster) const {
    constexpr double kWorthSaying = 0.1;
    const validate::HostMemory found = host_memory({&rates, 1});
    const validate::HostFactors f = validate::factors(found, cluster);
    if (std::abs(f.copies - 1) > kWorthSaying || std::abs(f.dram - 1) > kWorthSaying)
      note("this host's memory now: " + validate::describe(found, cluster) +
           "; the prediction is for the latter");
  }

  // Sums and the timeline of the step that has just run. Collective: every process brings its ranks' times.
  void profiled(const predict::Scenario& s, const train::Prepared& prepared, train::Trainer& trainer) {
    std::vector<program::RankTimeline> timelines;
    const auto add = [&](std::vector<program::OpSpan> spans) {
      timelines.push_back({fmt::format("rank {}, {} {}, measured", timelines.size(), s.model.name,
                                       plan::family_name(s.plan.family)),
                           &prepared.program, std::move(spans)});
    };
    launch::Peers& peers = trainer.peers();
    // Either this process has all ranks, or each has one: their order is that of the ranks.
    for (const int rank : trainer.machine().ranks()) {
      const std::vector<program::OpSpan> own = trainer.profiled_trace(rank);
      for (const std::vector<std::byte>& bytes : peers.gather(std::as_bytes(std::span(own)))) {
        std::vector<program::OpSpan> spans(bytes.size() / sizeof(program::OpSpan));
        std::memcpy(spans.data(), bytes.data(), bytes.size());
        add(std::move(spans));
      }
    }
    const std::vector<int> by_events = launch::everyones(peers, trainer.machine().timed_by_events() ? 1 : 0);
    const auto untold = [](const program::RankTimeline& rank) { return rank.spans.empty(); };
    if (peers.rank() != 0 || std::ranges::any_of(timelines, untold)) return;
    sums = validate::sum_operations(timelines);
    sums->intervals = std::ranges::max(by_events) > 0 ? "events" : on_gpus() ? "cupti" : "threads";
    if (!trace.empty()) program::write_timeline(trace, timelines);
  }

  // The planner's choice, of process 0.
  plan::Plan chosen(const predict::Scenario& s, launch::Peers& peers) const {
    std::string text;
    if (peers.rank() == 0) {
      Progress progress("choosing the plan");
      text =
          plan::describe(search::choose(s, [&](size_t done, size_t total) { progress.show(done, total); }));
    }
    const std::vector<std::byte> heard = peers.broadcast(std::as_bytes(std::span(text)));
    return plan::parse_plan(launch::text_of(heard));
  }

  void run() {
    flags.read_file();
    predict::Scenario s = scenario();
    complete(s);
    predict::validate(s);
    if (first() && !dry_run) {  // now, and not after the last step
      if (!options.export_folder.empty()) weights::check_export_folder(options.export_folder);
      if (!trace.empty()) program::check_timeline(trace);
    }
    if (options.data_path.empty() && !dry_run)
      throw UserError("no data is given; write --data FILE (text, or the .bin of an indexed dataset)");
    if (gpus > 1 && !options.place && !dry_run) {  // this process starts the ranks, and is none of them
      const int status = launch::spawn(static_cast<int>(gpus), invocation.words);
      if (status != 0) throw Ended{status};
      return;
    }
    std::optional<std::string> interrupted;
    if (!options.place || options.place->size == 1) {
      interrupted = train(std::move(s), launch::alone());
    } else {
      const std::unique_ptr<launch::Peers> peers = launch::connect(*options.place);
      // What stops one rank stops all, and is said once.
      try {
        interrupted = train(std::move(s), peers->channel());
      } catch (const std::exception& error) {
        peers->abandon(error.what(), dynamic_cast<const UserError*>(&error) != nullptr ? 2 : 1);
      }
    }
    if (interrupted && !first()) throw Ended{kInterrupted};
    if (interrupted) throw Interrupted{*interrupted};
  }

  // Returns what to say when the user interrupted it.
  std::optional<std::string> train(predict::Scenario s, std::unique_ptr<launch::Peers> peers) {
    std::optional<store::Store> store;
    if (first()) store = flags.open_store();
    const std::string key = keys_of(s).key;
    s.plan = chosen(s, *peers);
    if (dry_run && !first()) return std::nullopt;
    options.trainer.check_finite = check_finite || !on_gpus();  // a few percent of a step on the CPU
    const train::Prepared prepared({s.model, s.plan, s.gpus(), s.workload});
    store::RunRecord predicted;
    if (first()) {
      const predict::Prediction p = predict::predict(s);
      if (dry_run) {
        fmt::print("{}", flags.json()
                             ? pretty(answer_json(s, p)) + "\n"
                             : fmt::format("{}\n{} backend: {}", answer_text(s, p),
                                           gpus > 0 || on_gpus() ? "CUDA" : "CPU", memory_line(prepared)));
        return std::nullopt;
      }
      predicted = record(key, s, p, invocation.command_line);
      if (store) store->insert(predicted);
      if (!flags.json())
        fmt::print("{}plan {}\n{}{}", headline(s), plan::describe(s.plan), memory_line(prepared),
                   on_gpus() ? formula(s) : "");
    }

    TrainingObserver observer;
    observer.say = [this](const std::string& text) { note(text); };
    const int64_t tokens = predict::tokens_per_step(s), bytes = prepared.memory.arenas.hbm.bytes;
    observer.step = [&](const train::StepReport& step) {
      if (first()) print_step(s, step, tokens, bytes);
    };
    observer.host_rates = [&](const host::Rates& rates) { tell_host_memory(rates, s.cluster); };
    observer.profiled = [&](train::Trainer& trainer) { profiled(s, prepared, trainer); };
    observer.measured = [&](const TrainingReport& report) {
      if (store && !report.steps.empty()) store->insert(measurement(s, predicted, report));
    };
    const TrainingReport report = run_training(prepared, options, observer, std::move(peers));
    if (report.interrupted)
      return fmt::format("interrupted after step {}; {}", report.steps.back().step + 1,
                         options.save.empty() ? "nothing is saved without --save"
                                              : "the same command with --resume goes on");
    if (!trace.empty()) note(fmt::format("timeline in {}; open it at https://ui.perfetto.dev", trace));
    return std::nullopt;
  }
};

}  // namespace

void add_run(CLI::App& program, const Invocation& invocation) {
  CLI::App* command = program.add_subcommand("run", "train under a plan, and measure");
  const auto run = std::make_shared<Run>(*command, invocation);
  command->callback([run] { run->run(); });
}

}  // namespace mop::cli
