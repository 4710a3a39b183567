// Names inside of a folder of checkpoints.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace mop::checkpoint {

inline constexpr const char* kManifestName = "manifest.json";

std::string step_name(int64_t step);  // "step-000123"
std::string rank_name(size_t rank);   // "rank-00003.bin"

// The finished checkpoints by rising step, going by their names; those of a smaller step than `below`. None
// when there is no such folder. What is being written or removed is called step-000123.tmp-<process> and left
// out.
std::vector<std::filesystem::path> checkpoints(const std::filesystem::path& folder,
                                               int64_t below = INT64_MAX);

// The name that this process gives to a checkpoint while it writes or removes it.
std::filesystem::path temporary(const std::filesystem::path& checkpoint);

// Removes what processes that no longer run left unfinished.
void remove_leftovers(const std::filesystem::path& folder);

}  // namespace mop::checkpoint
