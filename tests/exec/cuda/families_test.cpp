// Whole steps in bf16 on one GPU: loss and every gradient of seven families against fp32 and transformers.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <ranges>

#include "exec/cpu/tensor.h"
#include "tests/error_of.h"
#include "tests/exec/support/reference.h"
#include "tests/exec/train/support.h"
#include "tests/kernels/device_array.h"

namespace mop::train::testing {
namespace {

using MakeMachine = std::unique_ptr<Machine> (*)(const Prepared&, const MachineOptions&);

std::unique_ptr<Machine> make_gpu(const Prepared& prepared, const MachineOptions& o) {
  return make_cuda_machine(prepared, o, launch::Place{}, launch::alone());
}

// Weights that are the same in bf16 and fp32.
class Rounded final : public weights::Source {
 public:
  Rounded(const model::ModelConfig& model, double deviation)
      : inner_(model, 7, deviation, weights::RandomSource::Vectors::random) {}
  void read(model::ParameterId id, int64_t row, int64_t col, int64_t rows, int64_t cols, float* out,
            int64_t ld) const override {
    inner_.read(id, row, col, rows, cols, out, ld);
    for (int64_t i = 0; i < rows * cols; ++i) {
      float& value = out[i / cols * ld + i % cols];
      uint16_t narrow = 0;
      const cpu::Run wide{reinterpret_cast<std::byte*>(&value), 1, program::Type::f32},
          bf16{reinterpret_cast<std::byte*>(&narrow), 1, program::Type::bf16};
      cpu::convert(wide, bf16);
      cpu::convert(bf16, wide);
    }
  }

 private:
  weights::RandomSource inner_;
};

struct Result {
  double loss = 0;
  Parameters gradients{};
};

Result first_step(const Job& job, const data::Sequences& data, const weights::Source& weights,
                  MakeMachine make) {
  const Prepared prepared(job);
  const TrainerOptions o = options();
  Trainer trainer(prepared, data, o, make(prepared, o));
  trainer.start(weights);
  const double loss = trainer.step().loss;
  return {loss, read_all(trainer, job.model, What::gradient)};
}

// |a - b| / |b| of the parameters' gradients, ascending; which is the farthest.
struct Distances {
  std::vector<double> all{};
  std::string farthest{};
  double share(double part) const {
    return all[static_cast<size_t>(part * static_cast<double>(all.size() - 1))];
  }
};

Distances distances(const model::ModelConfig& model, const Parameters& a, const Parameters& b) {
  Distances d;
  const std::vector<model::ParameterId> ids = model::parameters(model);
  double most = -1;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i].role == model::Role::correction_bias) continue;
    const double apart = d.all.emplace_back(distance(a[i], b[i]));
    if (apart <= most) continue;
    most = apart;
    d.farthest =
        fmt::format("{} of layer {}, expert {}", model::name(ids[i].role), ids[i].layer, ids[i].expert);
  }
  std::ranges::sort(d.all);
  return d;
}

TEST(Gpu, NamesTheFirstOperationThatMadeANaN) {
  if (const std::string reason = kernels::no_gpu(); !reason.empty()) GTEST_SKIP() << reason;
  const RandomSequences data(32, 256);
  for (const std::string& plan :
       {std::string("fsdp2:runtime=native"), mop_plan(1, 1, 1, 1, "optimizer=stream")}) {
    Trial setup{"tiny-qwen3-moe", plan, 1, 1};
    setup.precision = plan::Precision::bf16;
    SCOPED_TRACE(setup.text());
    const Prepared prepared(setup.job());
    TrainerOptions o = options();
    o.check_finite = true;
    Trainer healthy(prepared, data, o, make_gpu(prepared, o));
    healthy.start(weights::RandomSource(prepared.job.model, 3));
    for (int i = 0; i < 3; ++i) healthy.step();
    EXPECT_EQ(healthy.machine().first_not_finite().value_or(""), "");
    Trainer ill(prepared, data, o, make_gpu(prepared, o));
    ill.start(Poisoned(prepared.job.model, {model::Role::o, 2}));
    EXPECT_THAT(error_of([&] { ill.step(); }), ::testing::HasSubstr("(L2 forward "));
  }
}

class Families : public ::testing::TestWithParam<std::string> {
 protected:
  const weights::TensorFile file{reference_folder(GetParam()) / "reference.safetensors"};

  using Plans = std::vector<std::pair<std::string, int64_t>>;  // with the sequences of a micro-batch
  const Plans first{{"fsdp2:runtime=native", 2}, {mop_plan(1, 1, 1, 1, "vp-tile=16,round-rows=40"), 2}},
      more{{"fsdp2:runtime=native,recompute=none,offload=on", 1},
           {mop_plan(1, 1, 1, 1, "kept-layers=1"), 2},
           {mop_plan(1, 1, 1, 1, "checkpoints=host,optimizer=host,save-attention=off"), 1}};

  // check(job, data, kind): bf16; the same two sequences at once or one after the other.
  template <class Check>
  void for_each_job(const std::vector<Plans>& plans, Check check) {
    for (const std::string kind : {"plain", "packed", "balanced"}) {
      if (!file.tensors().contains(kind + ".loss")) continue;
      const ReferenceBatch data(file, kind == "balanced" ? "plain" : kind);
      for (const auto& [plan, sequences] : plans | std::views::join) {
        SCOPED_TRACE(GetParam() + " " + kind + " " + plan);
        Trial setup{(reference_folder(GetParam()) / "config.json").string(),
                    plan,
                    1,
                    sequences,
                    2 / sequences,
                    ReferenceBatch::kRows};
        setup.balance_loss = kind == "balanced";
        setup.precision = plan::Precision::bf16;
        try {
          check(setup.job(), data, kind);
        } catch (const std::exception& error) {
          ADD_FAILURE() << error.what();  // here, where the plan is told
        }
        if (HasFailure()) return;
      }
    }
  }

  // Every token goes to every expert, so that no choice hangs on a rounding, and weights are small, so that
  // activations stay off swiglu's limits: what is left is a dozen roundings of 2^-9 from each end, one upon
  // the other. On the CPU, which rounds what it stores, 0.9 % in the middle and 2 % at most; a GPU rounds
  // attention's probabilities and the gradients of its logits as well. The reference is the CPU's in fp32,
  // which tests/exec/train compares with transformers.
  void compare_with_fp32(MakeMachine make) {
    for_each_job({first, more}, [&](Job job, const data::Sequences& data, const std::string&) {
      job.model.top_k = job.model.experts;
      job.model.router_top_groups = job.model.router_groups;
      const Rounded weights(job.model, 0.05);
      const Result ours = first_step(job, data, weights, make);
      job.workload.precision = plan::Precision::fp32;
      const Result theirs = first_step(job, data, weights, make_cpu_machine);
      EXPECT_NEAR(ours.loss / theirs.loss, 1, 5e-4);
      const Distances d = distances(job.model, ours.gradients, theirs.gradients);
      EXPECT_LE(d.all.back(), 6e-2) << d.farthest;
      EXPECT_LE(d.share(0.5), 2e-2);
    });
  }

  // Where rounding changes a token's choice of experts, as it does for one in a hundred, gradients of experts
  // change by sqrt(2 / 100) and more, whoever rounds: not much further from transformers than the CPU is.
  void compare_with_transformers(MakeMachine make) {
    for_each_job({first}, [&](const Job& job, const data::Sequences& data, const std::string& kind) {
      const weights::RandomSource weights(job.model, 7, 0.2, weights::RandomSource::Vectors::random);
      const Result ours = first_step(job, data, weights, make),
                   rounded = first_step(job, data, weights, make_cpu_machine);
      Parameters theirs;
      for (const model::ParameterId id : model::parameters(job.model))
        theirs.push_back(id.role == model::Role::correction_bias
                             ? std::vector<float>()
                             : reference_gradient(file, kind, job.model, id));
      EXPECT_NEAR(ours.loss / reference_loss(file, kind), 1, 1e-2);
      const Distances d = distances(job.model, ours.gradients, theirs),
                      of_cpu = distances(job.model, rounded.gradients, theirs);
      for (const double part : {0.25, 0.5, 0.9})
        EXPECT_LE(d.share(part), 2 * of_cpu.share(part) + 0.03) << part;
    });
  }
};

TEST_P(Families, OnAGpuAreAsInFp32) {
  if (const std::string reason = kernels::no_gpu(); !reason.empty()) GTEST_SKIP() << reason;
  compare_with_fp32(make_gpu);
}
TEST_P(Families, OnAGpuAreAsInTransformers) {
  if (const std::string reason = kernels::no_gpu(); !reason.empty()) GTEST_SKIP() << reason;
  compare_with_transformers(make_gpu);
}

// Need no GPU: the tolerances allow what rounding costs on the CPU.
TEST_P(Families, RoundedAreAsInFp32) {
  compare_with_fp32(make_cpu_machine);
}
TEST_P(Families, RoundedAreAsInTransformers) {
  compare_with_transformers(make_cpu_machine);
}

INSTANTIATE_TEST_SUITE_P(, Families,
                         ::testing::Values("qwen3_moe", "gpt_oss", "deepseek_v3", "deepseek_v2", "mixtral",
                                           "olmoe", "glm4_moe"),
                         [](const auto& suite) { return suite.param; });

}  // namespace
}  // namespace mop::train::testing
