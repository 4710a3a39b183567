#include "exec/launch/place.h"

#include <gmock/gmock.h>

#include <map>

#include "tests/error_of.h"

namespace mop::launch {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

using Variables = std::map<std::string, std::string>;

std::optional<Place> place_in(const Variables& variables) {
  return place_of([&](const char* name) -> const char* {
    const auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  });
}

Variables with(Variables variables, const Variables& more) {
  for (const auto& [name, value] : more) variables[name] = value;
  return variables;
}

const Variables kTorchrun{{"RANK", "5"},         {"WORLD_SIZE", "8"},
                          {"LOCAL_RANK", "1"},   {"LOCAL_WORLD_SIZE", "4"},
                          {"MASTER_ADDR", "n1"}, {"MASTER_PORT", "29500"}};
const Variables kOpenMpi{{"OMPI_COMM_WORLD_RANK", "3"},
                         {"OMPI_COMM_WORLD_SIZE", "4"},
                         {"OMPI_COMM_WORLD_LOCAL_RANK", "3"},
                         {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"}};
const Variables kSlurm{{"SLURM_PROCID", "6"},
                       {"SLURM_NTASKS", "9"},
                       {"SLURM_STEP_NUM_TASKS", "9"},
                       {"SLURM_LOCALID", "2"},
                       {"SLURM_NODEID", "1"},
                       {"SLURM_STEP_TASKS_PER_NODE", "4(x2),1"},
                       {"SLURM_STEP_NODELIST", "gpu[07-08,12]"},
                       {"SLURM_JOB_ID", "4711"},
                       {"SLURM_STEP_ID", "0"}};
const Variables kHydra{
    {"PMI_RANK", "1"}, {"PMI_SIZE", "2"}, {"MPI_LOCALRANKID", "1"}, {"MPI_LOCALNRANKS", "2"}};

struct Case {
  const char* name;
  Variables variables;
  std::string expected;  // launcher rank/size local_rank/local_size address:port
};
std::ostream& operator<<(std::ostream& out, const Case& one) {
  return out << one.name;
}

class PlaceOf : public ::testing::TestWithParam<Case> {};

TEST_P(PlaceOf, TheLauncher) {
  const std::optional<Place> place = place_in(GetParam().variables);
  std::string text = "none";
  if (place)
    text = place->launcher + " " + std::to_string(place->rank) + "/" + std::to_string(place->size) + " " +
           std::to_string(place->local_rank) + "/" + std::to_string(place->local_size) + " " +
           place->address + ":" +
           (place->port >= 20000 && place->port < 32000 && !GetParam().variables.contains("MASTER_PORT")
                ? "job"
                : std::to_string(place->port));
  EXPECT_EQ(text, GetParam().expected);
}

INSTANTIATE_TEST_SUITE_P(
    Launchers, PlaceOf,
    ::testing::Values(
        Case{"nothing", {}, "none"}, Case{"empty", {{"RANK", ""}, {"WORLD_SIZE", ""}}, "none"},
        Case{"torchrun", kTorchrun, "torchrun 5/8 1/4 n1:29517"},
        Case{"torchrun_highest_port", with(kTorchrun, {{"MASTER_PORT", "65530"}}),
             "torchrun 5/8 1/4 n1:65513"},
        Case{"torchrun_of_one", {{"RANK", "0"}, {"WORLD_SIZE", "1"}}, "torchrun 0/1 0/1 127.0.0.1:0"},
        Case{"torchrun_within_others", with(with(kTorchrun, kOpenMpi), kSlurm), "torchrun 5/8 1/4 n1:29517"},
        Case{"our_spawn", with(kTorchrun, {{"MOP_LAUNCH", "1"}, {"MASTER_ADDR", "127.0.0.1"}}),
             "mop 5/8 1/4 127.0.0.1:29500"},
        Case{"open_mpi_one_host", kOpenMpi, "mpirun 3/4 3/4 127.0.0.1:job"},
        Case{"open_mpi_hosts",
             with(kOpenMpi, {{"OMPI_COMM_WORLD_SIZE", "8"}, {"MASTER_ADDR", "n1"}, {"MASTER_PORT", "5000"}}),
             "mpirun 3/8 3/4 n1:5000"},
        Case{"open_mpi_within_slurm", with(kOpenMpi, kSlurm), "mpirun 3/4 3/4 127.0.0.1:job"},
        Case{"slurm", kSlurm, "srun 6/9 2/4 gpu07:job"},
        Case{"slurm_last_node",
             with(kSlurm, {{"SLURM_NODEID", "2"}, {"SLURM_PROCID", "8"}, {"SLURM_LOCALID", "0"}}),
             "srun 8/9 0/1 gpu07:job"},
        Case{"slurm_address", with(kSlurm, {{"MASTER_ADDR", "10.0.0.1"}, {"MASTER_PORT", "7777"}}),
             "srun 6/9 2/4 10.0.0.1:7777"},
        Case{"slurm_tasks_per_node",
             {{"SLURM_PROCID", "6"},
              {"SLURM_NTASKS", "8"},
              {"SLURM_LOCALID", "2"},
              {"SLURM_NODEID", "1"},
              {"SLURM_NTASKS_PER_NODE", "4"},
              {"SLURM_JOB_NODELIST", "x1,node[003-005]"},
              {"SLURM_STEPID", "0"}},
             "srun 6/8 2/4 x1:job"},
        Case{"slurm_all_nodes_alike",
             {{"SLURM_PROCID", "6"},
              {"SLURM_NTASKS", "8"},
              {"SLURM_LOCALID", "2"},
              {"SLURM_TASKS_PER_NODE", "4(x2)"},
              {"SLURM_JOB_NODELIST", "rack[1,3]-node[01-04]"},
              {"SLURM_STEPID", "0"}},
             "srun 6/8 2/4 rack1-node01:job"},
        // salloc's shell, as a step of its own or as none; a batch script; srun --pty bash.
        Case{"slurm_shell",
             {{"SLURM_NTASKS", "8"}, {"SLURM_JOB_ID", "4711"}, {"SLURM_JOB_NODELIST", "gpu[07-08]"}},
             "none"},
        Case{"slurm_interactive_step", with(kSlurm, {{"SLURM_PROCID", "0"}, {"SLURM_STEP_NUM_TASKS", "1"}}),
             "none"},
        Case{"slurm_batch_script",
             {{"SLURM_PROCID", "0"},
              {"SLURM_LOCALID", "0"},
              {"SLURM_NTASKS", "8"},
              {"SLURM_TASKS_PER_NODE", "4(x2)"}},
             "none"},
        Case{"slurm_step_of_one",
             {{"SLURM_PROCID", "0"},
              {"SLURM_LOCALID", "0"},
              {"SLURM_NTASKS", "1"},
              {"SLURM_STEP_ID", "0"},
              {"PMI_RANK", "0"},
              {"PMI_SIZE", "1"}},
             "none"},
        Case{"hydra", kHydra, "the PMI launcher 1/2 1/2 127.0.0.1:job"},
        Case{"hydra_within_slurm", with(kSlurm, kHydra), "the PMI launcher 1/2 1/2 127.0.0.1:job"},
        Case{"pmi_hosts", with(kHydra, {{"PMI_SIZE", "4"}, {"MASTER_ADDR", "n1"}}),
             "the PMI launcher 1/4 1/2 n1:job"},
        Case{"pmix",
             {{"PMIX_RANK", "1"}, {"PMIX_SIZE", "2"}, {"PMIX_LOCAL_RANK", "1"}, {"PMIX_LOCAL_SIZE", "2"}},
             "the PMI launcher 1/2 1/2 127.0.0.1:job"},
        Case{"pmi_of_one", {{"PMI_RANK", "0"}, {"PMI_SIZE", "1"}}, "the PMI launcher 0/1 0/1 127.0.0.1:job"}),
    [](const auto& one) { return std::string(one.param.name); });

TEST(Place, RunsAreToldApartByTheirJob) {
  const Place place = *place_in(kSlurm),
              fellow = *place_in(with(kSlurm, {{"SLURM_PROCID", "7"}, {"SLURM_LOCALID", "3"}}));
  EXPECT_EQ(place.run, fellow.run);
  EXPECT_EQ(place.port, fellow.port);
  for (const char* name : {"SLURM_JOB_ID", "SLURM_STEP_ID"}) {
    const Place other = *place_in(with(kSlurm, {{name, "4712"}}));
    EXPECT_NE(place.run, other.run);
    EXPECT_NE(place.port, other.port);
  }
  const auto torchrun = [](const char* id) {
    return place_in(with(kTorchrun, {{"TORCHELASTIC_RUN_ID", id}}))->run;
  };
  EXPECT_EQ(torchrun("a"), torchrun("a"));
  EXPECT_NE(torchrun("a"), torchrun("b"));
}

TEST(Place, ReportsGoToOurOwnParentOnly) {
  EXPECT_EQ(place_in(with(kTorchrun, {{"MOP_LAUNCH", "1"}, {"MOP_LAUNCH_REPORTS", "7"}}))->reports, 7);
  EXPECT_EQ(place_in(with(kTorchrun, {{"MOP_LAUNCH_REPORTS", "7"}}))->reports, -1);
}

struct Wrong {
  const char* name;
  Variables variables;
  std::vector<std::string> said;
};
std::ostream& operator<<(std::ostream& out, const Wrong& one) {
  return out << one.name;
}

Variables without(Variables variables, const char* name) {
  variables.erase(name);
  return variables;
}

class PlaceErrors : public ::testing::TestWithParam<Wrong> {};

TEST_P(PlaceErrors, NameTheVariableAndItsValue) {
  const std::string message = error_of([] { place_in(GetParam().variables); });
  for (const std::string& part : GetParam().said) EXPECT_THAT(message, HasSubstr(part));
}

INSTANTIATE_TEST_SUITE_P(
    Errors, PlaceErrors,
    ::testing::Values(
        Wrong{"no_number", with(kTorchrun, {{"RANK", "five"}}), {"RANK is 'five'", "whole number"}},
        Wrong{"negative", with(kTorchrun, {{"RANK", "-1"}}), {"RANK is '-1'"}},
        Wrong{"trailing", with(kTorchrun, {{"WORLD_SIZE", "8 "}}), {"WORLD_SIZE is '8 '"}},
        Wrong{"too_large", with(kTorchrun, {{"WORLD_SIZE", "99999999999"}}), {"WORLD_SIZE is '99999999999'"}},
        Wrong{"rank_of_size", with(kTorchrun, {{"RANK", "8"}}), {"RANK is '8'", "WORLD_SIZE is '8'"}},
        Wrong{"no_processes", with(kTorchrun, {{"WORLD_SIZE", "0"}}), {"WORLD_SIZE is '0'", "1 or more"}},
        Wrong{"local_rank_of_size",
              with(kTorchrun, {{"LOCAL_RANK", "4"}}),
              {"LOCAL_RANK is '4'", "LOCAL_WORLD_SIZE is '4'"}},
        Wrong{"local_size_above",
              with(kTorchrun, {{"LOCAL_WORLD_SIZE", "9"}}),
              {"LOCAL_WORLD_SIZE is '9'", "WORLD_SIZE, which is '8'"}},
        Wrong{"no_world_size",
              without(kTorchrun, "WORLD_SIZE"),
              {"WORLD_SIZE is not set", "RANK is '5'", "torchrun"}},
        Wrong{"no_rank", without(kTorchrun, "RANK"), {"RANK is not set", "WORLD_SIZE is '8'"}},
        Wrong{"no_local_rank", without(kTorchrun, "LOCAL_RANK"), {"LOCAL_RANK is not set"}},
        Wrong{"no_local_size", without(kTorchrun, "LOCAL_WORLD_SIZE"), {"LOCAL_WORLD_SIZE is not set"}},
        Wrong{"no_address", without(kTorchrun, "MASTER_ADDR"), {"MASTER_ADDR is not set"}},
        Wrong{"no_port", without(kTorchrun, "MASTER_PORT"), {"MASTER_PORT is not set"}},
        Wrong{"port_zero", with(kTorchrun, {{"MASTER_PORT", "0"}}), {"MASTER_PORT is '0'", "65535"}},
        Wrong{"port_above", with(kSlurm, {{"MASTER_PORT", "65536"}}), {"MASTER_PORT is '65536'"}},
        Wrong{"open_mpi_hosts", with(kOpenMpi, {{"OMPI_COMM_WORLD_SIZE", "8"}}), {"-x MASTER_ADDR"}},
        Wrong{"open_mpi_no_size",
              without(kOpenMpi, "OMPI_COMM_WORLD_SIZE"),
              {"OMPI_COMM_WORLD_SIZE is not set", "mpirun"}},
        Wrong{"slurm_rank",
              with(kSlurm, {{"SLURM_PROCID", "9"}}),
              {"SLURM_PROCID is '9'", "SLURM_STEP_NUM_TASKS is '9'"}},
        Wrong{"slurm_local_rank", with(kSlurm, {{"SLURM_LOCALID", "4"}}), {"SLURM_LOCALID is '4'"}},
        Wrong{"slurm_no_such_node",
              with(kSlurm, {{"SLURM_NODEID", "3"}}),
              {"'4(x2),1'", "no node 3", "SLURM_NODEID"}},
        Wrong{"slurm_which_node", without(kSlurm, "SLURM_NODEID"), {"'4(x2),1'", "SLURM_NODEID"}},
        Wrong{"slurm_no_list",
              with(kSlurm, {{"SLURM_STEP_TASKS_PER_NODE", "4(x2"}}),
              {"SLURM_STEP_TASKS_PER_NODE is '4(x2'"}},
        Wrong{"slurm_hosts",
              with(kSlurm, {{"SLURM_STEP_NODELIST", "gpu[07-08"}}),
              {"SLURM_STEP_NODELIST is 'gpu[07-08'", "MASTER_ADDR"}},
        Wrong{"pmix_no_size", {{"PMIX_RANK", "1"}}, {"PMIX_SIZE is not set", "PMIX_RANK is '1'", "torchrun"}},
        Wrong{"pmi_hosts", with(kHydra, {{"PMI_SIZE", "4"}}), {"set MASTER_ADDR"}}),
    [](const auto& one) { return std::string(one.param.name); });

}  // namespace
}  // namespace mop::launch
