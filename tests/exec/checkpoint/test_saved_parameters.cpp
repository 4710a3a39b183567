#include <set>

#include "exec/checkpoint/saved_parameters.h"
#include "sim/base/error.h"
#include "sim/plan/plan.h"
#include "tests/exec/checkpoint/support.h"
#include "tests/plan_text.h"

namespace mop::checkpoint {
namespace {

float value(model::ParameterId id, What what, int64_t row, int64_t col) {
  const int64_t mixed = static_cast<int64_t>(id.role) * 31 + id.layer * 17 + id.expert * 13 + row * 7 +
                        col * 3 + static_cast<int64_t>(what) * 5;
  return static_cast<float>(mixed % 251 + 251) / 2;  // nine bits at most, exact in bf16 where even
}

struct Saved {
  model::ModelConfig model;
  plan::Plan plan;
  plan::Layout layout;
  program::ParameterLayout parameters;

  Saved(const std::string& name, const std::string& text, int64_t ranks)
      : model(model::read_config(name)),
        plan(plan::parse_plan(text)),
        layout(plan::layout(plan, ranks)),
        parameters(model, plan, layout) {}
};

class SavedParametersTest : public Folder {
 protected:
  // Scatters every parameter into the flat groups of the plan and saves them in random shards.
  void save(const Saved& saved, int64_t step, size_t ranks) {
    std::map<std::pair<program::FlatGroup, What>, std::vector<float>> flats;
    std::vector<Group> groups;
    for (const program::FlatGroup flat : saved.parameters.groups()) {
      groups.push_back({flat, saved.parameters.elements(flat)});
      for (const What what : {What::weights, What::master, What::m, What::v}) {
        auto& elements = flats[{flat, what}];
        elements.resize(static_cast<size_t>(groups.back().elements));
        for (const program::Piece& p : saved.parameters.pieces(flat))
          for (int64_t r = 0; r < p.rows; ++r)
            for (int64_t c = 0; c < p.cols; ++c)
              elements[static_cast<size_t>(p.offset + r * p.ld + c)] =
                  value(p.parameter, what, p.row + r, p.col + c);
      }
    }
    std::mt19937_64 random(static_cast<uint64_t>(step));
    const Filled memory = random_shards(
        state_of(step), ranks, groups,
        [&](program::FlatGroup flat, What what, int64_t i) {
          return flats.at({flat, what})[static_cast<size_t>(i)];
        },
        random);
    Writer writer(folder);
    writer.begin(memory.snapshot());
    writer.wait();
  }
};

// Values of the weights are bf16 on disk: compared as such.
float stored(float x, What what) {
  return what == What::weights ? std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0xffff0000) : x;
}

TEST_F(SavedParametersTest, GathersEveryParameterOfEveryPlan) {
  const std::vector<std::pair<std::string, int64_t>> plans{{mop_plan(1, 1, 1, 1), 1},
                                                           {mop_plan(4, 4, 2, 2), 4},
                                                           {mop_plan(2, 2, 4, 4, "head-chunks=1"), 4},
                                                           {mop_plan(2, 4, 2, 2, "head-chunks=2"), 4},
                                                           {"fsdp2", 3}};
  int64_t step = 0;
  for (const char* name : {"tiny-qwen3-moe", "tiny-deepseek-v3", "tiny-gpt-oss"})
    for (const auto& [text, ranks] : plans) {
      const Saved saved(name, text, ranks);
      save(saved, ++step, static_cast<size_t>(ranks));
      const Reader reader(folder / step_name(step));
      const SavedParameters parameters(reader, saved.parameters);
      std::mt19937_64 random(static_cast<uint64_t>(step));
      std::set<model::ParameterId> seen;
      for (const model::ParameterId id : model::parameters(saved.model)) {
        if (!parameters.has(id, What::master)) {
          ADD_FAILURE() << name << " " << text << ": " << model::name(id.role);
          continue;
        }
        seen.insert(id);
        const auto [rows, cols] = model::shape(saved.model, id);
        for (const What what : {What::weights, What::master, What::m, What::v}) {
          std::vector<float> out(static_cast<size_t>(rows * cols), -1);
          parameters.read(id, what, 0, 0, rows, cols, out.data(), cols);
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < cols; ++c)
              ASSERT_EQ(out[static_cast<size_t>(r * cols + c)], stored(value(id, what, r, c), what))
                  << name << " " << text << " " << model::name(id.role) << " (" << r << ", " << c << ")";
        }
        // A rectangle of it, into a wider matrix.
        const auto below = [&](int64_t n) {
          return static_cast<int64_t>(random() % static_cast<uint64_t>(n));
        };
        const int64_t row = below(rows), col = below(cols), height = 1 + below(rows - row),
                      width = 1 + below(cols - col);
        const int64_t ld = width + below(3);
        std::vector<float> out(static_cast<size_t>(height * ld), -1);
        parameters.read(id, What::m, row, col, height, width, out.data(), ld);
        for (int64_t r = 0; r < height; ++r)
          for (int64_t c = 0; c < ld; ++c)
            ASSERT_EQ(out[static_cast<size_t>(r * ld + c)],
                      c < width ? value(id, What::m, row + r, col + c) : -1);
      }
      EXPECT_GT(seen.size(), 10);
    }
}

TEST_F(SavedParametersTest, RefusesPlacesThatDoNotExist) {
  const Saved saved("tiny-qwen3-moe", mop_plan(2, 2, 2, 2), 2);
  save(saved, 1, 2);
  const Reader reader(folder / step_name(1));
  const SavedParameters parameters(reader, saved.parameters);
  std::vector<float> out(100000);
  const auto read = [&](model::ParameterId id, int64_t rows, int64_t cols) {
    parameters.read(id, What::m, 0, 0, rows, cols, out.data(), cols);
  };
  EXPECT_NO_THROW(read({model::Role::final_norm}, 1, saved.model.hidden));
  EXPECT_THROW(read({model::Role::final_norm}, 2, saved.model.hidden), InternalError);
  EXPECT_THROW(read({model::Role::final_norm}, 1, saved.model.hidden + 1), InternalError);
  EXPECT_THROW(read({model::Role::kv_a, 0}, 1, 1), InternalError);
  EXPECT_FALSE(parameters.has({model::Role::kv_a, 0}, What::m));
}

TEST(Fingerprint, IsOfTheShapes) {
  const model::ModelConfig model = model::read_config("tiny-qwen3-moe");
  model::ModelConfig other = model;
  other.name = "renamed";
  other.rope_theta *= 4;
  EXPECT_EQ(fingerprint(other), fingerprint(model));
  other.vocab += 1;
  EXPECT_NE(fingerprint(other), fingerprint(model));
  EXPECT_NE(fingerprint(model::read_config("tiny-olmoe")), fingerprint(model));
}

}  // namespace
}  // namespace mop::checkpoint
