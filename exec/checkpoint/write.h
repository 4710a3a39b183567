// The steps of writing one checkpoint. A process may write several ranks' files, or each rank's process its
// own; publish() comes after all of them.
#pragma once
#include <cstddef>
#include <filesystem>
#include <span>
#include <vector>

#include "exec/checkpoint/manifest.h"

namespace mop::checkpoint {

// Elements [first, first + data.size() / size of type) of a flat group, in host memory.
struct Part {
  program::FlatGroup flat;
  What what = What::weights;
  program::Type type = program::Type::f32;  // or bf16
  int64_t first = 0;
  std::span<const std::byte> data;
};

// Errors of both: UserError naming the file and the system's reason (a full disk, permissions).

// Writes rank's file into `folder` and returns, once it is on the disk, what the manifest says of it.
RankFile write_rank(const std::filesystem::path& folder, size_t rank, std::span<const Part> parts);

// Completes the checkpoint in `folder` with its manifest and names it `checkpoint`, at once and for good:
// before that it does not exist, afterwards it survives a crash. An older one of that name is replaced.
void publish(const std::filesystem::path& folder, const Manifest& manifest,
             const std::filesystem::path& checkpoint);

// Returns when the names in a folder are on the disk.
void sync_folder(const std::filesystem::path& folder);

}  // namespace mop::checkpoint
