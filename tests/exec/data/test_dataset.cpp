#include <gmock/gmock.h>

#include <algorithm>
#include <random>

#include "exec/data/dataset.h"
#include "tests/error_of.h"
#include "tests/exec/data/write_megatron.h"

namespace mop::data {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct Sequence {
  std::vector<int32_t> ids, targets, positions, starts;
  explicit Sequence(int64_t context) {
    for (auto* rows : {&ids, &targets, &positions, &starts}) rows->assign(static_cast<size_t>(context), -7);
  }
  bool operator==(const Sequence&) const = default;
};

Sequence sequence(const Dataset& data, int64_t index) {
  Sequence s(data.context());
  data.sequence(index, s.ids, s.targets, s.positions, s.starts);
  return s;
}

class DatasetTest : public Folder {
 protected:
  // Text of one file, or an indexed dataset with a document for each.
  Dataset text(const std::string& bytes, const DatasetOptions& options) {
    write_file(folder / "text", bytes);
    return {folder / "text", options};
  }
};

TEST_F(DatasetTest, PacksDocumentsIntoSequences) {
  write_megatron(folder / "x", 4, {{{1, 2, 3}}, {{4, 5}}, {{6, 7, 8, 9}}});
  const Dataset data(folder / "x", {.context = 4, .vocab = 10, .shuffle = false});
  ASSERT_EQ(data.tokens(), 9);
  ASSERT_EQ(data.sequences(), 2);
  const Sequence a = sequence(data, 0), b = sequence(data, 1);
  EXPECT_THAT(a.ids, ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(a.targets, ElementsAre(2, 3, -100, 5));
  EXPECT_THAT(a.positions, ElementsAre(0, 1, 2, 0));
  EXPECT_THAT(a.starts, ElementsAre(0, 0, 0, 3));
  EXPECT_THAT(b.ids, ElementsAre(5, 6, 7, 8));
  EXPECT_THAT(b.targets, ElementsAre(-100, 7, 8, 9));
  EXPECT_THAT(b.positions, ElementsAre(0, 0, 1, 2));  // what the sequence before holds is not seen
  EXPECT_THAT(b.starts, ElementsAre(0, 1, 1, 1));
}

TEST_F(DatasetTest, EndsDocumentsWithTheirToken) {
  write_megatron(folder / "x", 4, {{{1, 2, 3}}, {{4, 5}}, {{6}}});
  const Dataset data(folder / "x", {.context = 8, .vocab = 10, .end_of_document = 0});
  ASSERT_EQ(data.sequences(), 1);
  const Sequence a = sequence(data, 0);
  EXPECT_THAT(a.ids, ElementsAre(1, 2, 3, 0, 4, 5, 0, 6));
  EXPECT_THAT(a.targets, ElementsAre(2, 3, 0, -100, 5, 0, -100, 0));
  EXPECT_THAT(a.positions, ElementsAre(0, 1, 2, 3, 0, 1, 2, 0));
  EXPECT_THAT(a.starts, ElementsAre(0, 0, 0, 0, 4, 4, 4, 7));
}

TEST_F(DatasetTest, MasksTargets) {
  write_megatron(folder / "x", 4, {{{1, 2, 3}}, {{4, 5}}, {{6}}});
  write_megatron(folder / "mask", 1, {{{1, 0, 1}}, {{1, 0}}, {{1}}});
  const Dataset data(folder / "x",
                     {.context = 8, .vocab = 10, .end_of_document = 0, .loss_mask = folder / "mask"});
  const Sequence a = sequence(data, 0);
  EXPECT_THAT(a.ids, ElementsAre(1, 2, 3, 0, 4, 5, 0, 6));
  EXPECT_THAT(a.targets, ElementsAre(-100, 3, 0, -100, -100, -100, -100, 0));
  EXPECT_THAT(a.positions, ElementsAre(0, 1, 2, 3, 0, 1, 2, 0));
}

// The stream written out token by token.
struct Token {
  int32_t id;
  int64_t document;
  bool counts;
};

std::vector<Token> stream_of(const std::vector<Document>& documents, const std::vector<Document>& masks,
                             std::optional<int32_t> end_of_document) {
  std::vector<Token> stream;
  for (size_t d = 0; d < documents.size(); ++d) {
    for (size_t s = 0; s < documents[d].size(); ++s)
      for (size_t i = 0; i < documents[d][s].size(); ++i)
        stream.push_back({static_cast<int32_t>(documents[d][s][i]), static_cast<int64_t>(d),
                          masks.empty() || masks[d][s][i] == 1});
    const bool last =
        !stream.empty() && stream.back().document == static_cast<int64_t>(d) && stream.back().counts;
    if (end_of_document) stream.push_back({*end_of_document, static_cast<int64_t>(d), last});
  }
  return stream;
}

Sequence expected(const std::vector<Token>& stream, int64_t index, int64_t context) {
  Sequence s(context);
  int32_t start = 0;
  for (int64_t row = 0; row < context; ++row) {
    const Token& token = stream[static_cast<size_t>(index * context + row)];
    const Token& next = stream[static_cast<size_t>(index * context + row + 1)];
    const auto r = static_cast<size_t>(row);
    if (row > 0 && stream[static_cast<size_t>(index * context + row - 1)].document != token.document)
      start = static_cast<int32_t>(row);
    s.ids[r] = token.id;
    s.targets[r] = next.document == token.document && next.counts ? next.id : -100;
    s.starts[r] = start;
    s.positions[r] = static_cast<int32_t>(row) - start;
  }
  return s;
}

TEST_F(DatasetTest, EqualsTheStreamWrittenOut) {
  std::mt19937_64 random(1);
  const auto below = [&](uint64_t n) { return static_cast<int64_t>(random() % n); };
  for (int trial = 0; trial < 200; ++trial) {
    std::vector<Document> documents, masks;
    const int64_t longest = 1 + below(40);
    for (int64_t d = 1 + below(12); d > 0; --d) {
      Document& document = documents.emplace_back();
      Document& mask = masks.emplace_back();
      for (int64_t s = below(3); s > 0; --s) {
        auto& tokens = document.emplace_back();
        auto& counts = mask.emplace_back();
        for (int64_t i = below(static_cast<uint64_t>(longest)); i > 0; --i) {
          tokens.push_back(below(100));
          counts.push_back(below(2));
        }
      }
    }
    DatasetOptions options{.context = 1 + below(24), .vocab = 100};
    if (below(2)) options.end_of_document = 99;
    if (below(2)) {
      options.loss_mask = folder / "mask.idx";
      write_megatron(folder / "mask", 1, masks);
    } else {
      masks.clear();
    }
    write_megatron(folder / "x", below(2) ? 8 : 4, documents);
    const std::vector<Token> stream = stream_of(documents, masks, options.end_of_document);
    if (static_cast<int64_t>(stream.size()) <= options.context) {
      EXPECT_THAT(error_of([&] { Dataset(folder / "x", options); }),
                  HasSubstr("has " + std::to_string(stream.size()) + " token"));
      continue;
    }
    const Dataset data(folder / "x", options);
    ASSERT_EQ(data.tokens(), static_cast<int64_t>(stream.size()));
    ASSERT_EQ(data.sequences(), (data.tokens() - 1) / data.context());
    for (int64_t i = 0; i < data.sequences(); ++i)
      ASSERT_EQ(sequence(data, i), expected(stream, i, options.context)) << trial << " sequence " << i;

    // A part of the rows is that part of the sequence.
    const int64_t index = below(static_cast<uint64_t>(data.sequences()));
    const auto first = static_cast<size_t>(below(static_cast<uint64_t>(options.context)));
    const auto count = static_cast<size_t>(below(static_cast<uint64_t>(options.context) - first + 1));
    const Sequence whole = sequence(data, index);
    std::vector<int32_t> ids(count), targets(count), positions(count);
    data.rows(index, static_cast<int64_t>(first), ids, targets, positions);
    EXPECT_TRUE(std::equal(ids.begin(), ids.end(), whole.ids.begin() + static_cast<int64_t>(first)));
    EXPECT_TRUE(
        std::equal(targets.begin(), targets.end(), whole.targets.begin() + static_cast<int64_t>(first)));
    EXPECT_TRUE(std::equal(positions.begin(), positions.end(),
                           whole.positions.begin() + static_cast<int64_t>(first)));
  }
}

TEST_F(DatasetTest, EveryEpochHasEverySequenceInItsOwnOrder) {
  const DatasetOptions options{.context = 2, .vocab = 256, .seed = 3};
  const Dataset data = text(std::string(201, 'a'), options);
  std::vector<std::vector<int64_t>> orders;
  for (int64_t epoch = 0; epoch < 3; ++epoch) {
    std::vector<int64_t>& order = orders.emplace_back();
    for (int64_t i = 0; i < 100; ++i) order.push_back(data.at({epoch, i}));
    std::vector<int64_t> sorted = order;
    std::ranges::sort(sorted);
    for (int64_t i = 0; i < 100; ++i) EXPECT_EQ(sorted[static_cast<size_t>(i)], i);
    EXPECT_NE(order, sorted);
  }
  EXPECT_NE(orders[0], orders[1]);
  EXPECT_NE(orders[1], orders[2]);

  DatasetOptions other = options;
  other.seed = 4;
  const Dataset data4 = text(std::string(201, 'a'), other);
  for (int64_t epoch = 0; epoch < 3; ++epoch) {
    std::vector<int64_t> order;
    for (int64_t i = 0; i < 100; ++i) order.push_back(data4.at({epoch, i}));
    EXPECT_THAT(orders, Each(::testing::Ne(order)));
  }
  other.shuffle = false;
  EXPECT_EQ(text(std::string(201, 'a'), other).at({5, 17}), 17);
}

TEST_F(DatasetTest, AdvancesThroughEpochs) {
  const Dataset data = text(std::string(21, 'a'), {.context = 2, .vocab = 256});
  EXPECT_EQ(data.advance({0, 0}, 9), (Position{0, 9}));
  EXPECT_EQ(data.advance({0, 9}, 1), (Position{1, 0}));
  EXPECT_EQ(data.advance({3, 8}, 25), (Position{6, 3}));
}

TEST_F(DatasetTest, Errors) {
  EXPECT_THAT(error_of([&] { text("", {.context = 4, .vocab = 256}); }), HasSubstr("text has 0 tokens"));
  EXPECT_THAT(error_of([&] { text("abcd", {.context = 4, .vocab = 256}); }),
              HasSubstr("text has 4 tokens, but one sequence needs 5"));
  EXPECT_EQ(text("abcde", {.context = 4, .vocab = 256}).sequences(), 1);
  EXPECT_THAT(error_of([&] { text("abcde", {.context = 4, .vocab = 256, .end_of_document = 256}); }),
              HasSubstr("end-of-document token 256 is beyond"));
  EXPECT_THAT(error_of([&] { text("abcde", {.context = 4, .vocab = 256, .end_of_document = -1}); }),
              HasSubstr("end-of-document token -1 is beyond"));

  const auto read_error = [&](int code, int64_t token, int64_t vocab) {
    write_megatron(folder / "x", code, {{{1, 2, 3}}, {{4, 5}, {6, token, 8, 9}}});
    const Dataset data(folder / "x", {.context = 8, .vocab = vocab});
    return error_of([&] { sequence(data, 0); });
  };
  EXPECT_THAT(read_error(4, 50, 50), HasSubstr("x.bin: token 3 of document 1 (both from 0) is 50, beyond the "
                                               "model's vocabulary of 50"));
  EXPECT_THAT(read_error(4, -1, 50), HasSubstr("token 3 of document 1 (both from 0) is -1"));
  EXPECT_THAT(read_error(5, int64_t{1} << 32, 50), HasSubstr("token 3 of document 1"));  // not truncated to 0

  // Also when it is only the target of the last row.
  write_megatron(folder / "x", 4, {{{1, 2, 3, 4, 77}}});
  const Dataset data(folder / "x", {.context = 4, .vocab = 77});
  EXPECT_THAT(error_of([&] { sequence(data, 0); }), HasSubstr("token 4 of document 0 (both from 0) is 77"));
}

TEST_F(DatasetTest, ErrorsOfTheMask) {
  write_megatron(folder / "x", 4, {{{1, 2, 3}}, {{4, 5}}});
  const DatasetOptions options{.context = 4, .vocab = 10, .loss_mask = folder / "mask"};
  const auto error = [&](const std::vector<Document>& mask) {
    write_megatron(folder / "mask", 1, mask);
    return error_of([&] { sequence(Dataset(folder / "x", options), 0); });
  };
  EXPECT_THAT(error({{{1, 1, 1, 1, 1}}}), HasSubstr("mask.bin has 1 documents, but"));
  EXPECT_THAT(error({{{1, 1}}, {{1, 1, 1}}}), HasSubstr("document 0 has 2 tokens in"));
  EXPECT_THAT(error({{{1, 1, 1}}, {{1}}}), HasSubstr("document 1 has 1 tokens in"));
  EXPECT_THAT(error({{{1, 1, 2}}, {{1, 1}}}),
              HasSubstr("the loss mask of token 2 of document 0 (both from 0) is 2"));
}

}  // namespace
}  // namespace mop::data
