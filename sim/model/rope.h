// Rotary position embedding: the tables that a model's positions are rotated by, with the frequencies, YaRN
// scaling and pairing of Hugging Face transformers.
#pragma once
#include <cstdint>
#include <vector>

#include "sim/model/config.h"

namespace mop::model {

// Pair i of a token's `width` rotated elements, (x, y), becomes (x cos - y sin, y cos + x sin) by the entries
// (position, i) of the tables.
struct Rope {
  int64_t positions = 0, width = 0;
  bool interleaved = false;     // pair i: elements (2i, 2i + 1); else (i, i + width / 2)
  std::vector<float> cos, sin;  // (positions, width / 2), YaRN's attention factor included
  double attention_scale = 1;   // of q k^T: 1 / sqrt(qk_dim), and DeepSeek's factor for long contexts
};

// positions: how many, from 0 on; at least 1.
Rope make_rope(const ModelConfig& config, int64_t positions);

}  // namespace mop::model
