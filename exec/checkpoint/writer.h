// Writes checkpoints while training goes on, each process of a run the files of its own ranks.
#pragma once
#include <filesystem>
#include <functional>
#include <future>
#include <memory>
#include <string>
#include <vector>

#include "exec/checkpoint/write.h"
#include "exec/launch/peers.h"

namespace mop::checkpoint {

// What to write. Nothing is copied: the parts' memory must stay as it is until Writer::done().
struct Snapshot {
  State state;
  std::vector<std::vector<Part>> ranks;  // of this process
};

class Writer {
 public:
  // Makes the folder where there is none and removes what killed processes left there. One writer a folder.
  // `keep`: checkpoints that remain, the one just written among them; of those before it, the latest. peers:
  // of all processes, in the order of their ranks, each of which makes the same calls; all see the folder.
  // Errors: UserError for a folder that cannot be made.
  explicit Writer(const std::filesystem::path& folder, int keep = 2,
                  std::unique_ptr<launch::Peers> peers = launch::alone());
  ~Writer();  // waits; an error that nobody waited for is lost

  // Starts to write on a thread of its own. First waits for the one before, and throws its error: then
  // nothing has begun.
  void begin(Snapshot snapshot);

  bool done() const;  // nothing is being written

  // Returns when what was begun will survive a crash. Errors: UserError; that checkpoint is then gone,
  // earlier ones are untouched.
  void wait();

 private:
  void write(const Snapshot& snapshot) const;
  // What every process does; all go on when all of them are done. Process 0 gets what each returned. Errors:
  // the first of any, everywhere.
  std::vector<std::string> together(const std::function<std::string()>& act) const;
  void prune(const std::filesystem::path& newest, int64_t step) const;

  std::filesystem::path folder_;
  int keep_;
  std::unique_ptr<launch::Peers> peers_;
  std::future<void> pending_;
};

}  // namespace mop::checkpoint
