#include "exec/launch/place.h"

#include <fmt/format.h>
#include <unistd.h>

#include <charconv>
#include <initializer_list>
#include <string_view>

#include "sim/base/error.h"

namespace mop::launch {
namespace {

constexpr int kBesideTorchrun = 17;
constexpr int kFirstPort = 20000, kPorts = 12000;  // below those that Linux gives to outgoing connections

struct Variable {
  const char* name;
  std::string text;
};
using Names = std::initializer_list<const char*>;

std::optional<int> whole(std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) return std::nullopt;
  return value;
}

int number(const Variable& variable) {
  const std::optional<int> value = whole(variable.text);
  if (!value)
    throw UserError(
        fmt::format("the environment variable {} is '{}', not a whole number: set it right, or unset it",
                    variable.name, variable.text));
  return *value;
}

uint64_t hash(std::string_view text) {  // FNV-1a
  uint64_t h = 0xcbf29ce484222325;
  for (const char c : text) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return h;
}

// How one launcher calls what we need, by preference.
struct Vocabulary {
  const char* launcher;
  Names rank, size, local_rank, local_size, job;
};

const Vocabulary kTorchrun{
    "torchrun", {"RANK"}, {"WORLD_SIZE"}, {"LOCAL_RANK"}, {"LOCAL_WORLD_SIZE"}, {"TORCHELASTIC_RUN_ID"}};
const Vocabulary kOpenMpi{"mpirun",
                          {"OMPI_COMM_WORLD_RANK"},
                          {"OMPI_COMM_WORLD_SIZE"},
                          {"OMPI_COMM_WORLD_LOCAL_RANK"},
                          {"OMPI_COMM_WORLD_LOCAL_SIZE"},
                          {"PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_ess_jobid"}};
const Vocabulary kSlurm{"srun",
                        {"SLURM_PROCID"},
                        {"SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"},
                        {"SLURM_LOCALID"},
                        {"SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"},
                        {"SLURM_JOB_ID", "SLURM_JOBID"}};
const Vocabulary kPmi{"the PMI launcher",
                      {"PMIX_RANK", "PMI_RANK"},
                      {"PMIX_SIZE", "PMI_SIZE"},
                      {"MPI_LOCALRANKID", "PMIX_LOCAL_RANK", "PMI_LOCAL_RANK"},
                      {"MPI_LOCALNRANKS", "PMIX_LOCAL_SIZE", "PMI_LOCAL_SIZE"},
                      {"PMIX_NAMESPACE", "SLURM_JOB_ID"}};

class Environment {
 public:
  explicit Environment(const std::function<const char*(const char*)>& get) : get_(get) {}

  std::optional<Variable> find(Names names) const {
    for (const char* name : names)
      if (const char* text = get_(name); text != nullptr && *text != '\0') return Variable{name, text};
    return std::nullopt;
  }
  bool has(const char* name) const { return find({name}).has_value(); }

  Variable need(const Vocabulary& words, Names names) const {
    if (const auto variable = find(names)) return *variable;
    const Variable there = find(words.rank).value_or(find(words.size).value_or(Variable{"", ""}));
    throw UserError(
        fmt::format("the environment variable {} is not set, but {} is '{}': set both as {} does, or unset "
                    "both; or start with "
                    "torchrun",
                    *names.begin(), there.name, there.text, words.launcher));
  }

 private:
  const std::function<const char*(const char*)>& get_;
};

// {a, b}: a is one of 0 to b - 1.
void check_below(const Variable& a, const Variable& b) {
  if (number(b) < 1)
    throw UserError(fmt::format("the environment variable {} is '{}': it must be 1 or more", b.name, b.text));
  if (number(a) >= number(b))
    throw UserError(fmt::format(
        "the environment variable {} is '{}', but {} is '{}': it must be below; set both right, or "
        "unset both",
        a.name, a.text, b.name, b.text));
}

// One element of "4(x2),3": tasks of each node. Without the node's index all have to be alike.
Variable tasks_of_node(const Variable& list, const std::optional<Variable>& node) {
  const auto fail = [&](const std::string& why) {
    return UserError(
        fmt::format("the environment variable {} is '{}': {}; set SLURM_STEP_TASKS_PER_NODE to the tasks of "
                    "this node",
                    list.name, list.text, why));
  };
  int nodes = 0;
  std::string_view last;
  std::optional<std::string_view> found;
  bool alike = true;
  for (std::string_view rest = list.text; !rest.empty();) {
    const size_t comma = rest.find(',');
    std::string_view run = rest.substr(0, comma);  // "4", or "4(x2)" for two nodes
    rest = comma == rest.npos ? std::string_view() : rest.substr(comma + 1);
    int times = 1;
    if (const size_t open = run.find("(x"); open != run.npos && run.ends_with(')')) {
      times = whole(run.substr(open + 2, run.size() - open - 3)).value_or(0);
      run = run.substr(0, open);
    }
    if (!whole(run) || times < 1) throw fail("it is no list of tasks such as 4(x2),3");
    nodes += times;
    last = run;
    if (!node) {
      alike = alike && (!found || *found == run);
      found = run;
    } else if (!found && number(*node) < nodes) {
      found = run;
    }
  }
  // One number is said of all nodes (SLURM_NTASKS_PER_NODE).
  if (!found && nodes == 1) found = last;
  if (!found) throw fail(fmt::format("it has no node {}, which {} is", node->text, node->name));
  if (!alike) throw fail("nothing says which of its nodes this is (SLURM_NODEID)");
  return {list.name, std::string(*found)};
}

Place counts(const Environment& environment, const Vocabulary& words) {
  Place place;
  place.launcher = words.launcher;
  const Variable rank = environment.need(words, words.rank), size = environment.need(words, words.size);
  check_below(rank, size);
  place.rank = number(rank);
  place.size = number(size);
  if (place.size > 1) {
    const Variable local_rank = environment.need(words, words.local_rank);
    Variable local_size = environment.need(words, words.local_size);
    if (&words == &kSlurm) local_size = tasks_of_node(local_size, environment.find({"SLURM_NODEID"}));
    check_below(local_rank, local_size);
    place.local_rank = number(local_rank);
    place.local_size = number(local_size);
    if (place.local_size > place.size)
      throw UserError(
          fmt::format("the environment variable {} is '{}', more than {}, which is '{}': set both right",
                      local_size.name, local_size.text, size.name, size.text));
  }
  return place;
}

std::optional<int> master_port(const Environment& environment) {
  const auto variable = environment.find({"MASTER_PORT"});
  if (!variable) return std::nullopt;
  const int port = number(*variable);
  if (port < 1 || port > 65535)
    throw UserError(
        fmt::format("the environment variable MASTER_PORT is '{}': ports are 1 to 65535", variable->text));
  return port;
}

// The first of "node[003-005,7],x1": node003.
std::string first_host(const Variable& list) {
  std::string host;
  std::string_view rest = list.text;
  while (!rest.empty() && rest.front() != ',') {
    if (rest.front() != '[') {
      host += rest.front();
      rest.remove_prefix(1);
      continue;
    }
    const size_t close = rest.find(']'), end = rest.find_first_of("-,]");
    if (close == rest.npos || end == 1)
      throw UserError(
          fmt::format("the environment variable {} is '{}', no list of hosts: set MASTER_ADDR to the host of "
                      "task 0",
                      list.name, list.text));
    host += rest.substr(1, end - 1);
    rest.remove_prefix(close + 1);
  }
  return host;
}

std::string address_of_process_0(const Environment& environment, const Vocabulary& words,
                                 const Place& place) {
  if (const auto address = environment.find({"MASTER_ADDR"})) return address->text;
  if (&words == &kSlurm)
    if (const auto hosts = environment.find({"SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"}))
      return first_host(*hosts);
  if (place.local_size == place.size) return "127.0.0.1";
  throw UserError(fmt::format(
      "the processes of {} are on several hosts, and nothing says where process 0 is: {}", words.launcher,
      &words == &kOpenMpi ? "give mpirun -x MASTER_ADDR=HOST with the first host's name"
                          : "set MASTER_ADDR to its host in the environment of all"));
}

Place place_of_torchrun(const Environment& environment) {
  Place place = counts(environment, kTorchrun);
  const bool ours = environment.has("MOP_LAUNCH");
  if (ours) place.launcher = "mop";
  if (const auto job = environment.find(ours ? Names{"MOP_LAUNCH_RUN"} : kTorchrun.job))
    place.run = hash(job->text);
  if (const auto reports = environment.find({"MOP_LAUNCH_REPORTS"}); ours && reports)
    place.reports = number(*reports);
  if (place.size == 1) return place;
  place.address = environment.need(kTorchrun, {"MASTER_ADDR"}).text;
  environment.need(kTorchrun, {"MASTER_PORT"});
  place.port = *master_port(environment);
  if (!ours) place.port += place.port + kBesideTorchrun <= 65535 ? kBesideTorchrun : -kBesideTorchrun;
  return place;
}

Place place_of_job(const Environment& environment, const Vocabulary& words) {
  Place place = counts(environment, words);
  const auto job = environment.find(words.job), step = environment.find({"SLURM_STEP_ID", "SLURM_STEPID"});
  const std::string name =
      fmt::format("{} {} {}", getuid(), job ? job->text : "", step && &words == &kSlurm ? step->text : "");
  place.run = hash(name);
  place.address = address_of_process_0(environment, words, place);
  place.port = master_port(environment).value_or(kFirstPort + static_cast<int>(place.run % kPorts));
  return place;
}

// A batch script and salloc's shell have all variables of a task, but those of a step.
bool in_slurm_step(const Environment& environment) {
  return environment.has("SLURM_PROCID") &&
         environment.find({"SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"});
}

}  // namespace

std::optional<Place> place_of(const std::function<const char*(const char*)>& get) {
  const Environment environment(get);
  if (environment.find({"RANK", "WORLD_SIZE"})) return place_of_torchrun(environment);
  if (environment.find({"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"}))
    return place_of_job(environment, kOpenMpi);
  if (in_slurm_step(environment) && !environment.has("MPI_LOCALRANKID")) {
    // A step of one task is a shell more often than a run of one process.
    if (counts(environment, kSlurm).size == 1) return std::nullopt;
    return place_of_job(environment, kSlurm);
  }
  if (environment.find({"PMIX_RANK", "PMI_RANK", "PMI_SIZE"})) return place_of_job(environment, kPmi);
  return std::nullopt;
}

}  // namespace mop::launch
