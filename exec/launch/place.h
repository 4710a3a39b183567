// Which of a run's processes this is, as its launcher says in the environment.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace mop::launch {

struct Place {
  int rank = 0, size = 1;
  int local_rank = 0, local_size = 1;  // on this host
  std::string address = "127.0.0.1";   // of process 0
  int port = 0;
  std::string launcher;  // "torchrun", for messages
  uint64_t run = 0;  // of all processes of a run; another in other runs, where the launcher tells them apart
  int reports = -1;  // of our own spawn: the socket to the parent, which tells the user what ended the run
};

// The first launcher of these whose variables are there: torchrun (and our own spawn), Open MPI, Slurm, PMIx
// or PMI (MPICH, srun --mpi=pmi2); nothing when none started this process. get: getenv, or a test's. An empty
// variable counts as none. Errors: UserError for variables that contradict one another or are missing, with
// what to set.
//
// Slurm: tasks of a step of two or more only. What runs in a batch script or in salloc's shell is no such
// task, and what hydra (mpirun of MPICH and Intel MPI) starts through Slurm is PMI's.
//
// The port: MASTER_PORT; with torchrun MASTER_PORT + 17, or - 17 above 65535, because its own store listens
// at MASTER_PORT; without MASTER_PORT one of 20000 to 31999 by user and job.
std::optional<Place> place_of(const std::function<const char*(const char*)>& get);

}  // namespace mop::launch
