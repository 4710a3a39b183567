// What a checkpoint says of itself: manifest.json beside its rank files.
//
// A checkpoint is a folder step-000123: rank-00000.bin, rank-00001.bin, ... hold ranges of flat parameter
// groups (sim/program/parameters.h) as they were sharded, manifest.json says which range lies where. The
// order inside of a group is the saving plan's; plan and ranks are kept, so that a reader can rebuild its
// ParameterLayout.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "exec/data/sequences.h"
#include "sim/model/config.h"
#include "sim/program/program.h"

namespace mop::checkpoint {

enum class What : uint8_t { weights, master, m, v };
const char* name(What what);
std::string name(program::FlatGroup flat);  // "dense.12", "head"

// Where a run goes on.
struct State {
  int64_t step = 0;            // steps done
  int64_t optimizer_step = 0;  // updates done
  data::Position data;         // the sequence that comes next
  uint64_t seed = 0;
  std::string plan = {};  // plan::describe()
  int64_t ranks = 1;
  std::string model = {};  // its name
  uint64_t fingerprint = 0;
  bool operator==(const State&) const = default;
};

// Of the parameters' names and shapes: models that differ in it cannot load one another's checkpoints.
uint64_t fingerprint(const model::ModelConfig& model);

// Checksums (XXH64) are of pieces of this many bytes, so that a reader checks what it reads and no more.
inline constexpr int64_t kChecked = int64_t{16} << 20;

// Elements [first, first + count) of a group, from byte `offset` of the rank's file on.
struct Entry {
  program::FlatGroup flat;
  What what = What::weights;
  program::Type type = program::Type::f32;  // or bf16
  int64_t first = 0, count = 0, offset = 0;
  std::vector<uint64_t> checksums;

  int64_t end() const { return first + count; }
  int64_t bytes() const { return count * program::size_of(type); }
};

struct RankFile {
  int64_t bytes = 0;
  std::vector<Entry> entries;
};

struct Manifest {
  State state;
  std::vector<RankFile> files;
};

// JSON with a checksum of its own. parse_manifest throws UserError, beginning with `where`, for text that is
// not a manifest, is damaged or of a newer version.
std::string to_text(const Manifest& manifest);
Manifest parse_manifest(const std::string& text, const std::string& where);

}  // namespace mop::checkpoint
