#include "exec/checkpoint/writer.h"

#include <fmt/format.h>

#include <chrono>
#include <system_error>
#include <utility>

#include "exec/checkpoint/folder.h"
#include "sim/base/error.h"

namespace mop::checkpoint {

namespace fs = std::filesystem;

Writer::Writer(const fs::path& folder, int keep) : keep_(keep) {
  ensure(keep >= 1, "at least one checkpoint is kept");
  try {
    folder_ = fs::absolute(folder);
    if (fs::create_directories(folder_)) sync_folder(folder_.parent_path());
  } catch (const fs::filesystem_error& error) {
    throw UserError(fmt::format("cannot make the folder {} for checkpoints: {}; choose another",
                                folder.string(), error.code().message()));
  }
  remove_leftovers(folder_);
}

Writer::~Writer() {
  if (pending_.valid()) pending_.wait();
}

void Writer::begin(Snapshot snapshot) {
  wait();
  pending_ = std::async(std::launch::async,
                        [this, taken = std::move(snapshot)] { prune(write(taken), taken.state.step); });
}

bool Writer::done() const {
  return !pending_.valid() || pending_.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
}

void Writer::wait() {
  if (pending_.valid()) pending_.get();
}

fs::path Writer::write(const Snapshot& snapshot) const {
  const fs::path checkpoint = folder_ / step_name(snapshot.state.step), unfinished = temporary(checkpoint);
  std::error_code error;
  try {
    fs::remove_all(unfinished, error);
    if (!fs::create_directory(unfinished, error))
      throw UserError(fmt::format("cannot make the folder {}: {}; check the space and the permissions there",
                                  unfinished.string(), error.message()));
    Manifest manifest{snapshot.state, {}};
    for (size_t rank = 0; rank < snapshot.ranks.size(); ++rank)
      manifest.files.push_back(write_rank(unfinished, rank, snapshot.ranks[rank]));
    publish(unfinished, manifest, checkpoint);
  } catch (...) {
    fs::remove_all(unfinished, error);
    throw;
  }
  return checkpoint;
}

void Writer::prune(const fs::path& newest, int64_t step) const {
  const std::vector<fs::path> older = checkpoints(folder_, step);
  for (size_t i = 0; i + static_cast<size_t>(keep_ - 1) < older.size(); ++i) {
    std::error_code error;
    // Renamed first: one that is half removed must not look finished.
    fs::rename(older[i], temporary(older[i]), error);
    if (!error) fs::remove_all(temporary(older[i]), error);
    if (error)
      throw UserError(fmt::format("{} is written, but the old {} cannot be removed: {}; remove it by hand",
                                  newest.string(), older[i].string(), error.message()));
  }
}

}  // namespace mop::checkpoint
