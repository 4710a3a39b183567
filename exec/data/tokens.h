// Documents of tokens on disk, one after another: tokens are counted over all of them.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace mop::data {

class Tokens {
 public:
  virtual ~Tokens() = default;
  virtual const std::string& name() const = 0;  // for errors: the file
  virtual int64_t documents() const = 0;
  // First token of a document; begin(documents()) is the number of tokens. Documents may be empty.
  virtual int64_t begin(int64_t document) const = 0;
  // Tokens [first, first + out.size()). Ids beyond int32 come out as its nearest value.
  virtual void read(int64_t first, std::span<int32_t> out) const = 0;
};

// Text: bytes are the tokens (vocabulary 256). A file is one document; of a folder each regular file, in the
// order of their paths, those below hidden names left out. Errors: UserError.
std::unique_ptr<Tokens> open_text(const std::string& path);

// Megatron-LM's indexed dataset, <prefix>.bin and <prefix>.idx. Errors: UserError for a file that is missing,
// no index, of another version, of a type that holds no ids (floats), or where the two files do not match.
std::unique_ptr<Tokens> open_megatron(const std::string& prefix);

// By what `path` names: <prefix>.bin, <prefix>.idx or <prefix> of an indexed dataset, else text.
std::unique_ptr<Tokens> open_tokens(const std::string& path);

}  // namespace mop::data
