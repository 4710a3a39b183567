#include "exec/checkpoint/writer.h"

#include <fmt/format.h>

#include <chrono>
#include <span>
#include <system_error>
#include <utility>

#include "exec/checkpoint/folder.h"
#include "sim/base/error.h"

namespace mop::checkpoint {

namespace fs = std::filesystem;

Writer::Writer(const fs::path& folder, int keep, std::unique_ptr<launch::Peers> peers)
    : keep_(keep), peers_(std::move(peers)) {
  ensure(keep >= 1, "at least one checkpoint is kept");
  together([&]() -> std::string {
    if (peers_->rank() != 0) return {};
    try {
      folder_ = fs::absolute(folder);
      if (fs::create_directories(folder_)) sync_folder(folder_.parent_path());
    } catch (const fs::filesystem_error& error) {
      throw UserError(fmt::format("cannot make the folder {} for checkpoints: {}; choose another",
                                  folder.string(), error.code().message()));
    }
    remove_leftovers(folder_);
    return {};
  });
  folder_ = fs::absolute(folder);
}

Writer::~Writer() {
  if (pending_.valid()) pending_.wait();
}

void Writer::begin(Snapshot snapshot) {
  wait();
  pending_ = std::async(std::launch::async, [this, taken = std::move(snapshot)] { write(taken); });
}

bool Writer::done() const {
  return !pending_.valid() || pending_.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
}

void Writer::wait() {
  if (pending_.valid()) pending_.get();
}

std::vector<std::string> Writer::together(const std::function<std::string()>& act) const {
  const auto bytes = [](const std::string& text) { return std::as_bytes(std::span(text)); };
  std::string mine;
  try {
    mine = 'y' + act();
  } catch (const UserError& error) {
    mine = std::string("u") + error.what();
  } catch (const std::exception& error) {
    mine = std::string("i") + error.what();
  }
  std::vector<std::string> all;
  std::string verdict = "y";
  for (const std::vector<std::byte>& one : peers_->gather(bytes(mine))) {
    const std::string text = launch::text_of(one);
    if (text.front() != 'y' && verdict == "y") verdict = text;
    all.push_back(text.substr(1));
  }
  const std::vector<std::byte> heard = peers_->broadcast(bytes(verdict));
  const std::string why = launch::text_of(heard).substr(1);
  if (static_cast<char>(heard.front()) == 'u') throw UserError(why);
  if (static_cast<char>(heard.front()) == 'i') throw InternalError(why);
  return all;
}

void Writer::write(const Snapshot& snapshot) const {
  const bool first = peers_->rank() == 0;
  const fs::path checkpoint = folder_ / step_name(snapshot.state.step);
  // One folder of all processes: the name holds the first one's number.
  const std::string name = temporary(checkpoint).string();
  const fs::path unfinished(launch::text_of(peers_->broadcast(std::as_bytes(std::span(name)))));
  std::error_code error;
  try {
    together([&]() -> std::string {
      if (!first) return {};
      fs::remove_all(unfinished, error);
      if (!fs::create_directory(unfinished, error))
        throw UserError(
            fmt::format("cannot make the folder {}: {}; check the space and the permissions there",
                        unfinished.string(), error.message()));
      return {};
    });
    // A process's part of the manifest, as text.
    const std::vector<std::string> parts = together([&] {
      Manifest own{snapshot.state, {}};
      const size_t before = snapshot.ranks.size() * static_cast<size_t>(peers_->rank());
      for (size_t i = 0; i < snapshot.ranks.size(); ++i)
        own.files.push_back(write_rank(unfinished, before + i, snapshot.ranks[i]));
      return to_text(own);
    });
    together([&]() -> std::string {
      if (!first) return {};
      Manifest manifest{snapshot.state, {}};
      for (const std::string& part : parts)
        for (RankFile& file : parse_manifest(part, "a process's part").files)
          manifest.files.push_back(std::move(file));
      publish(unfinished, manifest, checkpoint);
      return {};
    });
  } catch (...) {
    if (first) fs::remove_all(unfinished, error);
    throw;
  }
  if (first) prune(checkpoint, snapshot.state.step);
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
