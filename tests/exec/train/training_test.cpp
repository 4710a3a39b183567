// Training as a whole: it learns, it goes on where it stopped, and it says what went wrong.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <limits>
#include <numeric>

#include "exec/checkpoint/reader.h"
#include "exec/checkpoint/writer.h"
#include "tests/error_of.h"
#include "tests/exec/train/support.h"

namespace mop::train::testing {
namespace {

using ::testing::HasSubstr;

weights::RandomSource source(const model::ModelConfig& model) {
  return weights::RandomSource(model, 3);
}

class Folder {
 public:
  Folder() {
    std::string text = (std::filesystem::temp_directory_path() / "mop-train-XXXXXX").string();
    path = ::mkdtemp(text.data());
  }
  ~Folder() { std::filesystem::remove_all(path); }
  std::filesystem::path path;
};

void save(Trainer& trainer, const std::filesystem::path& folder) {
  trainer.flush();
  checkpoint::Writer writer(folder);
  std::vector<std::byte> copy;
  writer.begin({trainer.state(3), trainer.shards().copy_state(copy)});
  writer.wait();
}

TEST(Training, LearnsASequenceByHeart) {
  const OneSequence data(32, 256);
  for (const auto& [plan, ranks, precision] :
       {std::tuple{std::string("fsdp2:runtime=native"), 1, plan::Precision::bf16},
        {std::string("fsdp2:runtime=native,ep=2"), 2, plan::Precision::fp32},
        {mop_plan(2, 4, 2, 2, "optimizer=host"), 4, plan::Precision::bf16},
        {mop_plan(2, 4, 2, 4, "vp-scheme=weights,optimizer=stream,clip=off"), 4, plan::Precision::fp32}}) {
    Trial setup{"tiny-qwen3-moe", plan, ranks, 1};
    setup.precision = precision;
    SCOPED_TRACE(setup.text());
    const Prepared prepared(setup.job());
    Trainer trainer(prepared, data, options(5e-3));
    trainer.start(source(prepared.job.model));
    double loss = trainer.step().loss;
    EXPECT_NEAR(loss, std::log(256.0), 0.3);  // it knows nothing yet
    for (int i = 0; i < 80; ++i) loss = trainer.step().loss;
    EXPECT_LT(loss, 0.1);
  }
}

TEST(Training, ResumeIsTheSameAsNotStopping) {
  const RandomSequences data(32, 256);
  for (const auto& [plan, ranks] : {std::pair{mop_plan(2, 4, 2, 2, "optimizer=stream"), 4},
                                    {mop_plan(2, 2, 1, 2, "optimizer=host,clip=off"), 2},
                                    {std::string("fsdp2:runtime=native,offload=on"), 2}}) {
    for (const auto precision : {plan::Precision::fp32, plan::Precision::bf16}) {
      Trial setup{"tiny-deepseek-v3", plan, ranks, 1};
      setup.precision = precision;
      SCOPED_TRACE(setup.text());
      const Folder folder;
      const Prepared prepared(setup.job());
      const model::ModelConfig& model = prepared.job.model;
      Trainer whole(prepared, data, options());
      whole.start(source(model));
      for (int i = 0; i < 3; ++i) whole.step();
      save(whole, folder.path);
      std::vector<double> losses;
      for (int i = 0; i < 3; ++i) losses.push_back(whole.step().loss);
      whole.flush();

      const checkpoint::Newest newest = checkpoint::open_newest(folder.path);
      ASSERT_TRUE(newest.reader);
      Trainer resumed(prepared, data, options());
      resumed.resume(*newest.reader);
      EXPECT_EQ(resumed.steps_done(), 3);
      for (const double loss : losses) EXPECT_EQ(resumed.step().loss, loss);
      resumed.flush();
      for (const What what : {What::weights, What::master, What::m, What::v})
        EXPECT_EQ(read_all(resumed, model, what), read_all(whole, model, what)) << static_cast<int>(what);
    }
  }
}

TEST(Training, ResumesUnderAnotherPlanAndNumberOfRanks) {
  const RandomSequences data(32, 256);
  for (const char* model : {"tiny-deepseek-v3", "tiny-gpt-oss", "tiny-olmoe"}) {
    SCOPED_TRACE(model);
    const Folder folder;
    Trial setup{model, mop_plan(2, 4, 2, 2, "optimizer=host"), 4, 4};
    const Prepared prepared(setup.job());
    Trainer whole(prepared, data, options());
    whole.start(source(prepared.job.model));
    for (int i = 0; i < 3; ++i) whole.step();
    save(whole, folder.path);
    const double next = whole.step().loss;
    const checkpoint::Newest newest = checkpoint::open_newest(folder.path);
    ASSERT_TRUE(newest.reader);
    for (const auto& [plan, ranks, sequences] :
         {std::tuple{std::string("fsdp2:runtime=native"), 1, 8},
          {std::string("fsdp2:runtime=native,ep=2"), 8, 1},
          {mop_plan(8, 4, 4, 8, "optimizer=stream,vp-scheme=weights"), 8, 4},
          {mop_plan(8, 4, 4, 8, "clip=off,optimizer=stream,optimizer-staged-layers=1"), 8, 4}}) {
      Trial other{model, plan, ranks, sequences};
      SCOPED_TRACE(other.text());
      const Prepared elsewhere(other.job());
      Trainer resumed(elsewhere, data, options());
      resumed.resume(*newest.reader);
      EXPECT_NEAR(resumed.step().loss / next, 1, 1e-5);
    }
  }
}

TEST(Training, RefusesACheckpointOfAnotherModel) {
  const RandomSequences data(32, 256);
  const Folder folder;
  const Prepared one(Trial{"tiny-qwen3-moe"}.job()), other(Trial{"tiny-mixtral"}.job());
  Trainer trainer(one, data, options());
  trainer.start(source(one.job.model));
  trainer.step();
  save(trainer, folder.path);
  const checkpoint::Newest newest = checkpoint::open_newest(folder.path);
  Trainer wrong(other, data, options());
  EXPECT_THAT(error_of([&] { wrong.resume(*newest.reader); }), HasSubstr("tiny-qwen3-moe"));
}

TEST(Training, SaysWhichOperationMadeTheFirstNaN) {
  const RandomSequences data(32, 256);
  for (const auto& [plan, ranks] :
       {std::pair{std::string("fsdp2:runtime=native"), 1}, {mop_plan(2, 4, 2, 2), 4}}) {
    Trial setup{"tiny-qwen3-moe", plan, ranks, 1};
    SCOPED_TRACE(setup.text());
    const Prepared prepared(setup.job());
    TrainerOptions o = options();
    o.check_finite = true;
    Trainer trainer(prepared, data, o);
    trainer.start(Poisoned(prepared.job.model, {model::Role::o, 2}));
    const std::string error = error_of([&] { trainer.step(); });
    EXPECT_THAT(error, HasSubstr("not finite"));
    EXPECT_THAT(error, HasSubstr("(L2 forward "));
  }
}

TEST(Training, CountsTheRowsOfEveryExpert) {
  const RandomSequences data(32, 256);
  for (const auto& [plan, ranks] :
       {std::pair{std::string("fsdp2:runtime=native"), 1}, {mop_plan(2, 4, 2, 2), 4}}) {
    Trial setup{"tiny-deepseek-v3", plan, ranks, 4};
    setup.accumulate = 2;
    SCOPED_TRACE(setup.text());
    const Prepared prepared(setup.job());
    const model::ModelConfig& model = prepared.job.model;
    Trainer trainer(prepared, data, options());
    trainer.start(source(model));
    for (int step = 0; step < 2; ++step) {
      const double imbalance = trainer.step().expert_imbalance;
      double worst = 1;
      const auto& rows = trainer.machine().expert_rows();
      ASSERT_EQ(std::ssize(rows), model.layers);
      for (int64_t l = 0; l < model.layers; ++l) {
        const std::vector<int64_t>& layer = rows[static_cast<size_t>(l)];
        EXPECT_EQ(std::ssize(layer), model.moe[static_cast<size_t>(l)] ? model.experts : 0);
        if (layer.empty()) continue;
        // Each rank of a group of `ep` counts what all of them send, in forward and in backward.
        const int64_t ep = ranks == 1 ? 1 : 2,
                      copies = 2 *
                               program::tokens_per_rank(plan::layout(prepared.job.plan, ranks),
                                                        prepared.job.workload) *
                               model.top_k;
        EXPECT_EQ(std::accumulate(layer.begin(), layer.end(), int64_t{0}), 2 * copies * ep * ranks) << l;
        worst = std::max(worst, plan::imbalance(layer));
      }
      EXPECT_EQ(imbalance, worst);
    }
  }
}

// Low bits of masters are no numbers, whatever they look like.
TEST(Training, NothingIsNotFiniteInAHealthyRun) {
  const RandomSequences data(32, 256);
  for (const char* more : {"optimizer=hbm", "optimizer=stream", "optimizer=stream,optimizer-staged-layers=1",
                           "optimizer=host"}) {
    Trial setup{"tiny-qwen3-moe", mop_plan(2, 4, 2, 2, more), 4, 1};
    setup.precision = plan::Precision::bf16;
    SCOPED_TRACE(setup.text());
    const Prepared prepared(setup.job());
    TrainerOptions o = options();
    o.check_finite = true;
    Trainer trainer(prepared, data, o);
    trainer.start(source(prepared.job.model));
    for (int i = 0; i < 3; ++i) trainer.step();
    trainer.flush();
    EXPECT_EQ(trainer.machine().first_not_finite().value_or(""), "");
  }
}

TEST(Training, SaysWhichTokenIsBeyondTheVocabulary) {
  const RandomSequences data(32, 300);  // the model's vocabulary is 256
  for (const auto& [plan, ranks] :
       {std::pair{std::string("fsdp2:runtime=native"), 2}, {mop_plan(2, 4, 2, 2), 4}}) {
    Trial setup{"tiny-qwen3-moe", plan, ranks, 4};
    const Prepared prepared(setup.job());
    Trainer trainer(prepared, data, options());
    trainer.start(source(prepared.job.model));
    EXPECT_THAT(error_of([&] {
                  for (int i = 0; i < 50; ++i) trainer.step();
                }),
                HasSubstr("vocabulary"));
  }
}

TEST(Training, RefusesATiedHeadUnderMop) {
  Trial setup{"tiny-qwen3-moe", mop_plan(1, 1, 1, 1)};
  Job job = setup.job();
  job.model.tied_head = true;
  EXPECT_THAT(error_of([&] { const Prepared prepared(job); }), HasSubstr("fsdp2"));
}

}  // namespace
}  // namespace mop::train::testing
