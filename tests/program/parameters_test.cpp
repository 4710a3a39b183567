// Flat groups hold every parameter once, and the shards of all ranks hold every group as often as there are
// replicas.
#include "sim/program/parameters.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "sim/model/tensors.h"
#include "tests/program/support.h"

namespace mop::program::testing {
namespace {

struct Question {
  std::string plan;
  int64_t gpus;
};

std::vector<Question> questions(const model::ModelConfig& c) {
  std::vector<Question> all{{mop_plan(4, 8, 2, 8), 8},
                            {mop_plan(2, 4, 1, 2), 8},
                            {mop_plan(4, 12, 4, 12, "expert-placement=across"), 12},
                            {mop_plan(1, 1, 1, 1), 1},
                            {"fsdp2:runtime=native", 8},
                            {"fsdp2:runtime=native,ep=4,replicate=2", 8}};
  if (c.qk_norm != model::QkNorm::full) all.push_back({mop_plan(4, 8, 2, 4, "head-chunks=2"), 8});
  return all;
}

ParameterLayout layout_of(const model::ModelConfig& c, const Question& q) {
  const plan::Plan plan = plan::parse_plan(q.plan);
  plan::validate(plan, c, q.gpus, 192);
  return {c, plan, plan::layout(plan, q.gpus)};
}

TEST(Parameters, PiecesHoldEveryElementOnce) {
  for (const char* name : kTinyModels) {
    const model::ModelConfig c = model::read_config(name);
    for (const Question& q : questions(c)) {
      SCOPED_TRACE(std::string(name) + " " + q.plan);
      const ParameterLayout layout = layout_of(c, q);
      std::map<model::ParameterId, std::vector<int>> held;
      for (const model::ParameterId id : model::parameters(c)) {
        const model::MatrixShape shape = model::shape(c, id);
        held[id].resize(static_cast<size_t>(shape.rows * shape.cols));
      }
      for (const FlatGroup group : layout.groups()) {
        std::vector<int> taken(static_cast<size_t>(layout.elements(group)));
        for (const Piece& piece : layout.pieces(group)) {
          ASSERT_TRUE(held.contains(piece.parameter)) << model::name(piece.parameter.role);
          const int64_t width = model::shape(c, piece.parameter).cols;
          ASSERT_GE(piece.ld, piece.cols);
          for (int64_t row = 0; row < piece.rows; ++row)
            for (int64_t col = 0; col < piece.cols; ++col) {
              ++held[piece.parameter].at(static_cast<size_t>((piece.row + row) * width + piece.col + col));
              ++taken.at(static_cast<size_t>(piece.offset + row * piece.ld + col));
            }
        }
        EXPECT_LE(*std::ranges::max_element(taken), 1) << "pieces of a group overlap";
        // Only the embedding's columns are padded inside of a group.
        if (group.part != FlatPart::embedding) {
          EXPECT_EQ(std::ranges::count(taken, 0), 0);
        }
      }
      for (const auto& [id, times] : held)
        EXPECT_TRUE(std::ranges::all_of(times, [](int n) { return n == 1; }))
            << model::name(id.role) << " of layer " << id.layer;
    }
  }
}

TEST(Parameters, PiecesOfShippedModelsAddUp) {
  for (const std::string& name : model::shipped_models()) {
    const model::ModelConfig c = model::read_config(name);
    const model::Parameters counted = model::count_parameters(c);
    for (const Question& q : questions(c)) {
      if (name.starts_with("tiny") || q.gpus == 12) continue;
      SCOPED_TRACE(name + " " + q.plan);
      const ParameterLayout layout = layout_of(c, q);
      std::map<model::ParameterId, int64_t> held;
      int64_t all = 0;
      for (const FlatGroup group : layout.groups())
        for (const Piece& piece : layout.pieces(group)) {
          held[piece.parameter] += piece.rows * piece.cols;
          all += piece.rows * piece.cols;
          ASSERT_LE(piece.offset + (piece.rows - 1) * piece.ld + piece.cols, layout.elements(group));
          const model::MatrixShape shape = model::shape(c, piece.parameter);
          ASSERT_LE(piece.row + piece.rows, shape.rows);
          ASSERT_LE(piece.col + piece.cols, shape.cols);
        }
      EXPECT_EQ(all, counted.total);
      const std::vector<model::ParameterId> ids = model::parameters(c);
      EXPECT_EQ(held.size(), ids.size());
      for (const model::ParameterId id : ids) {
        const model::MatrixShape shape = model::shape(c, id);
        ASSERT_EQ(held[id], shape.rows * shape.cols) << model::name(id.role) << " of layer " << id.layer;
      }
    }
  }
}

// What operations read as one matrix follows one another: gate and up, keys and values, an expert's own.
TEST(Parameters, OffsetsAreOfTheFirstPiece) {
  for (const char* name : kTinyModels) {
    const model::ModelConfig c = model::read_config(name);
    for (const Question& q : questions(c)) {
      SCOPED_TRACE(std::string(name) + " " + q.plan);
      const ParameterLayout layout = layout_of(c, q);
      for (const FlatGroup group : layout.groups()) {
        std::map<model::Role, int64_t> first;
        for (const Piece& piece : layout.pieces(group)) {
          const auto found = first.try_emplace(piece.parameter.role, piece.offset).first;
          found->second = std::min(found->second, piece.offset);
        }
        for (const auto& [role, offset] : first) {
          if (role == model::Role::v || role == model::Role::v_bias) continue;  // of the keys' chunks
          EXPECT_EQ(layout.offset(group, role), offset) << model::name(role);
        }
      }
      const FlatGroup experts{FlatPart::experts, static_cast<int32_t>(c.layers - 1)};
      EXPECT_EQ(
          layout.offset(experts, model::Role::expert_up) - layout.offset(experts, model::Role::expert_gate),
          c.expert_intermediate * c.hidden);
      EXPECT_EQ(layout.elements(experts), c.experts * layout.expert_elements());
    }
  }
}

int64_t index_in(int64_t rank, const plan::Span& span) {
  return rank / span.stride % span.size;
}

// How many ranks hold the elements from each key on.
using Held = std::map<int64_t, int64_t>;

void expect_shards(const Lowered& l) {
  const ParameterLayout layout = l.parameter_layout();
  std::map<FlatGroup, Held> change;
  for (const FlatGroup group : layout.groups()) change[group];
  EXPECT_EQ(l.program.shards.size(), change.size());
  for (const Shard& s : l.program.shards) {
    ASSERT_TRUE(change.contains(s.flat));
    for (int64_t rank = 0; rank < l.layout.ranks; ++rank) {
      const int64_t outer = index_in(rank, s.outer) * s.outer_elements;
      const int64_t end = s.outer_elements > 0 ? outer + s.outer_elements : layout.elements(s.flat);
      const int64_t first = std::min(end, outer + index_in(rank, s.inner) * s.elements);
      ++change[s.flat][first];
      --change[s.flat][std::min(end, first + s.elements)];
    }
    int64_t held = 0;
    EXPECT_EQ(change[s.flat].begin()->first, 0);
    for (const auto& [element, more] : change[s.flat]) {
      held += more;
      EXPECT_EQ(held, element < layout.elements(s.flat) ? s.replicas : 0) << "from element " << element;
    }
    // Where they are.
    const auto room = [&](BufferId buffer, int64_t offset, int64_t bytes) {
      EXPECT_LE(offset + bytes, l.program.buffers.at(buffer).bytes);
      EXPECT_TRUE(l.program.buffers[buffer].persistent);
    };
    room(s.weights, s.weights_offset, s.elements * size_of(s.weights_type));
    if (s.flat.part == FlatPart::router_bias) {
      EXPECT_EQ(s.gradient, kNoBuffer);
      EXPECT_TRUE(s.states.empty());
      EXPECT_EQ(s.weights_type, Type::f32);
      continue;
    }
    room(s.gradient, s.gradient_offset, s.elements * size_of(s.gradient_type));
    const int64_t blocks = ceil_div(s.states_first + s.elements, s.states_bucket);
    EXPECT_GE(std::ssize(s.states), blocks);
    for (const BufferId states : s.states) room(states, 0, state_bytes(s.master) * s.states_bucket);
    const bool fsdp2 = l.plan.family == plan::Family::fsdp2,
               by_cpu = l.program.buffers[s.states[0]].space == Space::host &&
                        l.plan.optimizer != plan::Optimizer::stream;
    EXPECT_EQ(s.master, fsdp2                                   ? Master::weights
                        : by_cpu || s.weights_type == Type::f32 ? Master::states
                                                                : Master::low);
  }
}

TEST(Shards, OfAllRanksHoldEveryGroupOnceAReplica) {
  std::vector<Case> cases = tiny_native_cases();
  for (const char* model : kTinyModels)  // groups that divide little: padding at the end
    for (const std::string& plan :
         {mop_plan(4, 12, 4, 12), mop_plan(2, 6, 1, 3, "expert-placement=across"),
          std::string("fsdp2:runtime=native,ep=4"), std::string("fsdp2:runtime=native,replicate=3")})
      cases.push_back({model, plan, 12, 192, 1, 1});
  const std::vector<std::string> shipped = model::shipped_models();
  for (const std::string& name : shipped)
    for (const std::string& plan :
         {mop_plan(8, 24, 2, 24, "optimizer=stream"), std::string("fsdp2:runtime=native,ep=8,offload=on")})
      cases.push_back({name.c_str(), plan, 24, 1536, 1, 1});
  for (const Case& c : cases) {
    SCOPED_TRACE(c.text());
    expect_shards(c.lower());
    if (::testing::Test::HasFailure()) return;
  }
}

TEST(HeadChunks, DealEveryHead) {
  for (const std::string& name : model::shipped_models()) {
    const model::ModelConfig c = model::read_config(name);
    const int64_t kv_heads = c.attention == model::Attention::mla ? c.heads : c.kv_heads;
    for (const int64_t ranks : {1, 2, 4, 8, 16, 32})
      for (const int64_t chunks : {1, 2, 4}) {
        if (c.heads % (ranks * chunks) != 0 || (kv_heads % ranks != 0 && ranks % kv_heads != 0)) continue;
        const HeadChunks h = head_chunks(c, ranks, chunks);
        SCOPED_TRACE(name + " " + std::to_string(ranks) + " " + std::to_string(chunks));
        EXPECT_EQ(h.heads * chunks * ranks, c.heads);
        EXPECT_EQ(h.kv_heads * h.kv_chunks * ranks, kv_heads * h.kv_replicas);
        EXPECT_TRUE(h.kv_chunks == chunks || h.kv_chunks == 1);
      }
  }
}

}  // namespace
}  // namespace mop::program::testing
