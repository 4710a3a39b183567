// Checkpoints on disk: safetensors files (8 bytes of header length, little-endian; a JSON header; row-major
// data), one or several with an index.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "exec/data/mapped_file.h"
#include "exec/weights/convert.h"
#include "exec/weights/output_file.h"
#include "sim/model/tensors.h"

namespace mop::weights {

inline constexpr const char* kSingleFile = "model.safetensors";
inline constexpr const char* kIndexFile = "model.safetensors.index.json";

// A tensor of a mapped file. `type` is spelled as in the file: it may be one that convert.h does not know.
struct Tensor {
  std::string type;
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;
  int64_t bytes = 0;
};

// One file, memory-mapped: only what is read is loaded. Immutable, so any thread may read.
class TensorFile {
 public:
  // Errors: UserError that names the file and what is wrong: missing, cut off, not safetensors.
  explicit TensorFile(std::filesystem::path path);

  const std::filesystem::path& path() const { return path_; }
  const std::unordered_map<std::string, Tensor>& tensors() const { return tensors_; }

 private:
  std::filesystem::path path_;
  data::MappedFile mapping_;
  std::unordered_map<std::string, Tensor> tensors_;
};

// The files of a folder.
class Checkpoint {
 public:
  // Opens model.safetensors, or the shards of the index. Errors: UserError as TensorFile's, and for a shard
  // that the index names and the folder lacks, and a tensor that is not where the index says.
  explicit Checkpoint(const std::filesystem::path& folder);

  struct Place {
    const TensorFile* file = nullptr;
    const Tensor* tensor = nullptr;
    explicit operator bool() const { return tensor != nullptr; }
  };
  Place find(const std::string& name) const;
  const std::vector<TensorFile>& files() const { return files_; }

 private:
  void index();

  std::vector<TensorFile> files_;
  std::unordered_map<std::string, Place> places_;
};

// A block of a parameter out of the tensor that holds it: `stored` says where. Touches no other bytes.
void read_block(const Tensor& tensor, const model::Stored& stored, int64_t row, int64_t col, int64_t rows,
                int64_t cols, float* out, int64_t ld);

struct TensorPlan {
  std::string name;
  Type type;
  std::vector<int64_t> shape;
};

// Writes the files of a checkpoint into an existing folder, front to back: what it holds in memory does not
// grow with the model.
class Writer {
 public:
  // A file ends before the tensor that would bring its data over `max_file_bytes`. One file gets no index.
  Writer(std::filesystem::path folder, std::vector<TensorPlan> plan, int64_t max_file_bytes);
  ~Writer();
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  // The next elements: tensors in the order of the plan, each row-major. Errors: UserError when the disk is
  // full or fails.
  void append(std::span<const float> values);

  // Writes the index and waits until everything is on the disk. Every tensor must be complete.
  void finish();

 private:
  void open_next();

  std::filesystem::path folder_;
  std::vector<TensorPlan> plan_;
  std::vector<size_t> first_;  // index of each file's first tensor, and the plan's size
  size_t tensor_ = 0;          // being written
  int64_t left_ = 0;           // of it, elements
  size_t opened_ = 0;          // files
  std::unique_ptr<OutputFile> file_;
};

}  // namespace mop::weights
