#include <algorithm>

#include "tests/error_of.h"
#include "tests/exec/cpu/support.h"

namespace mop::cpu {
namespace {

constexpr int64_t kVocab = 11, kWidth = 70;

Setting vocabulary() {
  Setting setting;
  setting.model.vocab = kVocab;
  return setting;
}
Values any_ids(int64_t n) {
  Values ids;
  for (int64_t i = 0; i < n; ++i) ids.push_back(static_cast<double>(uniform(0, kVocab - 1)));
  return ids;
}

TEST(Embedding, LooksUpRows) {
  for (const Type type : kReals) {
    Tensor ids = Tensor::contiguous(1, 40, any_ids(40), Type::i32),
           table = Tensor::random(kVocab, kWidth, type), x(40, kWidth, type);
    run_op(OpKind::embedding, {}, {&ids, &table}, {&x}, vocabulary());
    for (int64_t i = 0; i < x.size(); ++i)
      EXPECT_EQ(x.at(i), table.at(static_cast<int64_t>(ids.at(i / kWidth)) * kWidth + i % kWidth));
  }
}

TEST(Embedding, NamesATokenBeyondTheVocabulary) {
  Tensor table = Tensor::random(kVocab + 2, kWidth), x(4, kWidth);  // rows of padding do not count
  for (const double bad : {-1.0, static_cast<double>(kVocab)}) {
    Tensor ids = Tensor::contiguous(1, 4, {0, 1, bad, 2}, Type::i32);
    const std::string message = error_of([&] {
      run_op(OpKind::embedding, {}, {&ids, &table}, {&x}, vocabulary());
    });
    EXPECT_NE(message.find("token " + std::to_string(static_cast<int>(bad)) + " at position 2"),
              std::string::npos)
        << message;
  }
}

TEST(Embedding, BackwardAddsUpEveryTokensRows) {
  for (const Type type : kReals) {
    for (const bool accumulate : {false, true}) {
      const int64_t t = 200;  // of 11 tokens: many repeat
      Tensor ids = Tensor::contiguous(1, t, any_ids(t), Type::i32), dx = Tensor::random(t, kWidth, type),
             d_table = Tensor::random(kVocab + 1, kWidth, type);
      Values want = accumulate ? d_table.values() : Values(static_cast<size_t>(d_table.size()));
      for (int64_t i = 0; i < dx.size(); ++i)
        want[static_cast<size_t>(static_cast<int64_t>(ids.at(i / kWidth)) * kWidth + i % kWidth)] += dx.at(i);
      Does does;
      does.accumulate = accumulate;
      run_op(OpKind::embedding_bwd, does, {&ids, &dx}, {&d_table}, vocabulary());
      expect_close(d_table, want);  // rounded once, not once a token
    }
  }
}

class Source final : public interpreter::BatchSource {
 public:
  void fill(int64_t micro, const interpreter::Batch& batch) override {
    const auto m = static_cast<int32_t>(micro);
    for (size_t i = 0; i < batch.ids.size(); ++i) {
      batch.ids[i] = m * 100 + static_cast<int32_t>(i);
      batch.targets[i] = i % 3 == 0 ? -100 : 5;
      batch.positions[i] = static_cast<int32_t>(i);
    }
    std::fill(batch.starts.begin(), batch.starts.end(), m);
  }
};

TEST(NextBatch, FillsItsMicroBatchAndCountsTargets) {
  Source source;
  Setting setting;
  setting.step.data = &source;
  Tensor ids(1, 7, Type::i32), targets(1, 7, Type::i32), positions(1, 7, Type::i32), starts(1, 14, Type::i32),
      valid(1, 1, Type::f64);
  for (const int32_t micro : {0, 1}) {
    Does does;
    does.a = micro;
    does.accumulate = micro > 0;
    run_op(OpKind::next_batch, does, {}, {&ids, &targets, &positions, &starts, &valid}, setting);
    EXPECT_EQ(ids.at(6), micro * 100 + 6);
    EXPECT_EQ(targets.at(1), 5);
    EXPECT_EQ(positions.at(3), 3);
    EXPECT_EQ(starts.at(13), micro);
    EXPECT_EQ(valid.at(0), 4 * (micro + 1));
  }
}

}  // namespace
}  // namespace mop::cpu
