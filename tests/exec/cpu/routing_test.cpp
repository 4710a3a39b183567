// Routed layers on a group of ranks against the same layer computed token by token.
#include "exec/cpu/routing.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>

#include "exec/cpu/gemm.h"
#include "sim/base/error.h"
#include "tests/exec/cpu/routing_support.h"
#include "tests/exec/support/allocations.h"

namespace mop::cpu::test {
namespace {

using program::Does;
using program::Exchange;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

int64_t pick(std::mt19937_64& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

// A layer of linear experts, y = sum over choices of weight (W x + b), and everything that its ranks hold.
struct Layer {
  int ranks = 1;
  int64_t experts = 1, k = 1, n = 1, width = 1, out = 1;
  plan::LeastLoadedOptions options;
  int64_t capacity = 1;
  int slots = 1;
  Type type = Type::f32, gradient = Type::f32;
  bool accumulate = false;  // adds to the gradients of weights that are there

  struct Results {
    Tensor y, dx, d_gates, dw, db;
  };
  struct Rank : Results {
    Tensor x, ids, gates, dy, w, b;  // (n, width), (n, k), (n, k), (n, out), (e, out, width), (e, 1, out)
  };
  std::vector<Rank> rank{};

  int64_t own() const { return experts / ranks; }

  void fill(std::mt19937_64& random,
            int64_t hot) {  // of 10 tokens, how many go to expert 0 and its neighbours
    for (int r = 0; r < ranks; ++r) {
      Rank& s = rank.emplace_back();
      s.x = Tensor(type, n, width, 1, 1), s.dy = Tensor(type, n, out);
      s.w = Tensor(type, out, width, own(), 2), s.b = Tensor(type, 1, out, own());
      s.ids = Tensor(Type::i32, n, k), s.gates = Tensor(Type::f32, n, k);
      for (Tensor* t : {&s.x, &s.dy, &s.w, &s.b, &s.gates}) t->randomise(random);
      static_cast<Results&>(s) = results(Type::f32, gradient);
      s.d_gates.fill(1e30);
      for (Tensor* t : {&s.dw, &s.db}) accumulate ? t->randomise(random) : t->fill(kNan);
      for (int64_t t = 0; t < n; ++t) {
        std::vector<int64_t> all(static_cast<size_t>(experts));
        std::iota(all.begin(), all.end(), 0);
        std::shuffle(all.begin(), all.end(), random);
        if (pick(random, 0, 9) < hot) std::ranges::sort(all);
        for (int64_t i = 0; i < k; ++i) s.ids.set(t, i, static_cast<double>(all[i]));
      }
    }
  }

  Results results(Type activations, Type gradients) const {  // zero
    return {Tensor(activations, n, out), Tensor(activations, n, width), Tensor(activations, n, k),
            Tensor(gradients, out, width, own()), Tensor(gradients, 1, out, own())};
  }

  std::vector<Results> by_definition() const {
    std::vector<Results> direct;
    for (int r = 0; r < ranks; ++r) {
      Results& to = direct.emplace_back(results(Type::f64, Type::f64));
      if (!accumulate) continue;
      for (int64_t i = 0; i < to.dw.elements(); ++i) to.dw.set(i, rank[r].dw.at(i));
      for (int64_t i = 0; i < to.db.elements(); ++i) to.db.set(i, rank[r].db.at(i));
    }
    for (int r = 0; r < ranks; ++r) {
      const Rank& from = rank[r];
      for (int64_t t = 0; t < n; ++t) {
        for (int64_t i = 0; i < k; ++i) {
          const int64_t expert = static_cast<int64_t>(from.ids.at(t, i)), e = expert % own();
          const Rank& owner = rank[expert / own()];
          Results& to = direct[expert / own()];
          const double gate = from.gates.at(t, i);
          double d_gate = 0;
          for (int64_t o = 0; o < out; ++o) {
            double sum = owner.b.at(e * out + o);
            for (int64_t c = 0; c < width; ++c) sum += owner.w.at(e * out + o, c) * from.x.at(t, c);
            const double dy = from.dy.at(t, o);
            direct[r].y.set(t, o, direct[r].y.at(t, o) + gate * sum);
            d_gate += sum * dy;
            to.db.set(e * out + o, to.db.at(e * out + o) + gate * dy);
            for (int64_t c = 0; c < width; ++c) {
              const int64_t at = (e * out + o) * width + c;
              to.dw.set(at, to.dw.at(at) + gate * dy * from.x.at(t, c));
              direct[r].dx.set(t, c, direct[r].dx.at(t, c) + gate * dy * owner.w.at(e * out + o, c));
            }
          }
          direct[r].d_gates.set(t, i, d_gate);
        }
      }
    }
    return direct;
  }
};

// What one rank does with a layer, as a lowering would write it down.
class Worker {
 public:
  Worker(Layer& layer, Group& group, int index)
      : l_(layer),
        group_(group),
        index_(index),
        r_(layer.rank[static_cast<size_t>(index)]),
        constants_{model_, {}, layer.options, layer.capacity, layer.slots},
        order_(Type::i32, 1, layer.n * layer.k),
        counts_(Type::i32, 1, layer.experts),
        all_counts_(Type::i32, layer.ranks, layer.experts),
        rounds_(Type::i32, 1,
                plan::round_plan_bytes(layer.ranks, static_cast<int>(layer.experts), layer.slots) / 4 + 1) {
    slots_dw_.fill(kNan);
    slots_db_.fill(kNan);
  }

  void run() {
    const int64_t before = mop::test::allocations_of_thread();
    local(OpKind::sort, {}, {&r_.ids}, {&order_, &counts_});
    remote(OpKind::all_gather, {}, {&counts_}, {&all_counts_});
    local(OpKind::plan_routing, {}, {&all_counts_}, {&rounds_});
    const plan::RoundPlan& plan = round_plan(rounds_.operand());
    passes = plan.passes(), rounds = plan.rounds();
    for (round_ = 0; round_ < plan.rounds(); ++round_) forward();
    for (round_ = 0; round_ < plan.rounds(); ++round_) backward();
    allocations = mop::test::allocations_of_thread() - before;
  }

  int passes = 0, rounds = 0;
  int64_t allocations = 0;
  bool untouched = true;  // slots that nobody borrowed

 private:
  using Tensors = std::initializer_list<const Tensor*>;

  // A call without an allocation of the test's own.
  template <class Run>
  void call(OpKind kind, Does does, Tensors in, Tensors out, Run run) {
    std::array<Operand, 6> reads, writes;
    size_t read = 0, written = 0;
    for (const Tensor* t : in) reads[read++] = t == nullptr ? Operand{} : t->operand();
    for (const Tensor* t : out) writes[written++] = t->operand();
    program::Op op{};
    op.kind = kind, op.does = does;
    run(Call{0, &op, std::span(reads).first(read), std::span(writes).first(written), index_, l_.ranks,
             round_});
  }
  void local(OpKind kind, Does does, Tensors in, Tensors out) {
    call(kind, does, in, out, [&](const Call& c) { run_routed(c, constants_, workspace_); });
  }
  void remote(OpKind kind, Does does, Tensors in, Tensors out) {
    call(kind, does, in, out, [&](const Call& c) { group_.collective(c, workspace_); });
  }
  void exchange(Exchange exchange, Tensors in, Tensors out, bool first = false, bool last = false) {
    remote(OpKind::all_to_all, {.first_round = first, .last_round = last, .exchange = exchange}, in, out);
  }

  void forward() {
    borrow();
    local(OpKind::permute, {}, {&r_.x, &order_, &rounds_}, {single() ? &here_x_ : &sent_x_});
    if (!single()) exchange(Exchange::dispatch, {&rounds_, &sent_x_}, {&here_x_});
    experts_forward();
    if (!single()) exchange(Exchange::combine, {&rounds_, &here_y_}, {&back_y_});
    local(OpKind::unpermute, {.accumulate = true},
          {single() ? &here_y_ : &back_y_, &order_, &rounds_, &r_.gates}, {&r_.y});
  }

  void backward() {
    borrow();
    local(OpKind::permute, {}, {&r_.x, &order_, &rounds_, &r_.dy, &r_.gates},
          {single() ? &here_x_ : &sent_x_, single() ? &here_dy_ : &sent_dy_,
           single() ? &here_gates_ : &sent_gates_});
    if (!single())
      exchange(Exchange::dispatch, {&rounds_, &sent_x_, &sent_dy_, &sent_gates_},
               {&here_x_, &here_dy_, &here_gates_});
    experts_forward();  // here_y = W x + b: its product with dy is the gradient of the gate
    local(OpKind::expert_bias_bwd, {.accumulate = l_.accumulate}, {&here_dy_, &rounds_, &here_gates_},
          {&r_.db, &slots_db_});
    const Call at{0, nullptr, {}, {}, index_, l_.ranks, round_};
    for (int64_t i = 0; i < rows_of_round(at, rounds_.operand()); ++i) {
      double d_gate = 0;
      for (int64_t o = 0; o < l_.out; ++o) {
        d_gate += here_y_.at(i, o) * here_dy_.at(i, o);
        here_y_.set(i, o,
                    here_gates_.at(i) * here_dy_.at(i, o));  // now the gradient of what the expert returned
      }
      here_d_gates_.set(i, d_gate);
    }
    local(OpKind::grouped_gemm, {}, {&here_y_, &rounds_, &r_.w, &slots_w_}, {&here_dx_});
    local(OpKind::grouped_gemm, {.accumulate = l_.accumulate, .transpose_a = true},
          {&here_y_, &here_x_, &rounds_}, {&r_.dw, &slots_dw_});
    if (!single())
      exchange(Exchange::combine, {&rounds_, &here_dx_, &here_d_gates_}, {&back_dx_, &back_d_gates_});
    local(OpKind::unpermute_bwd, {.accumulate = true},
          {single() ? &here_dx_ : &back_dx_, &order_, &rounds_, single() ? &here_d_gates_ : &back_d_gates_},
          {&r_.dx, &r_.d_gates});
    if (single()) return;
    exchange(Exchange::spill_gradients, {&rounds_, &slots_dw_}, {&staging_, &r_.dw}, false, true);
    exchange(Exchange::spill_gradients, {&rounds_, &slots_db_}, {&staging_, &r_.db}, false, true);
    end_round();
  }

  // Slots hold what the next pass has to overwrite; those that nobody borrowed hold it still.
  void end_round() {
    const plan::RoundPlan& plan = round_plan(rounds_.operand());
    const int pass = plan.pass_of(static_cast<int>(round_));
    const auto borrowed = std::ranges::count(plan.transfers(pass), index_, &plan::WeightTransfer::to);
    for (int64_t slot = borrowed; slot < s_; ++slot)
      untouched &=
          std::isnan(slots_dw_.at(slot * l_.out * l_.width)) && std::isnan(slots_db_.at(slot * l_.out));
    if (round_ + 1 < plan.first_round(pass) + plan.rounds(pass)) return;
    slots_dw_.fill(kNan);
    slots_db_.fill(kNan);
  }

  void borrow() {
    if (single()) return;
    exchange(Exchange::spill_weights, {&rounds_, &r_.w}, {&slots_w_}, true);
    exchange(Exchange::spill_weights, {&rounds_, &r_.b}, {&slots_b_}, true);
  }
  void experts_forward() {
    local(OpKind::grouped_gemm, {.transpose_b = true},
          {&here_x_, &rounds_, &r_.w, &slots_w_, &r_.b, &slots_b_}, {&here_y_});
  }
  bool single() const { return l_.ranks == 1; }

  Layer& l_;
  Group& group_;
  int index_;
  int64_t round_ = 0;
  Layer::Rank& r_;
  model::ModelConfig model_;
  Constants constants_;
  Workspace workspace_{multiply_bytes() + (1 << 14)};
  Tensor order_, counts_, all_counts_, rounds_;
  const int64_t c_ = l_.capacity, s_ = l_.slots;
  Tensor sent_x_{l_.type, c_, l_.width}, sent_dy_{l_.type, c_, l_.out, 1, 3}, sent_gates_{Type::f32, 1, c_};
  Tensor here_x_{l_.type, c_, l_.width, 1, 1}, here_dy_{l_.type, c_, l_.out}, here_gates_{Type::f32, 1, c_};
  Tensor here_y_{Type::f32, c_, l_.out}, here_dx_{Type::f32, c_, l_.width}, here_d_gates_{Type::f32, 1, c_};
  Tensor back_y_{Type::f32, c_, l_.out}, back_dx_{Type::f32, c_, l_.width}, back_d_gates_{Type::f32, 1, c_};
  Tensor slots_w_{l_.type, l_.out, l_.width, s_}, slots_b_{l_.type, 1, l_.out, s_};
  Tensor slots_dw_{l_.gradient, l_.out, l_.width, s_, 1}, slots_db_{l_.gradient, 1, l_.out, s_};
  Tensor staging_{l_.gradient, l_.out, l_.width, 1};
};

void expect_near(const Tensor& got, const Tensor& want, double tolerance) {
  double scale = 1;
  for (int64_t i = 0; i < want.elements(); ++i) scale = std::max(scale, std::abs(want.at(i)));
  for (int64_t i = 0; i < want.elements(); ++i) ASSERT_NEAR(got.at(i), want.at(i), tolerance * scale) << i;
}

struct Seen {
  int passes, rounds;
};

Seen check(Layer& layer) {
  const std::vector<Layer::Results> direct = layer.by_definition();
  Group group(layer.ranks);
  std::vector<std::unique_ptr<Worker>> workers;
  for (int r = 0; r < layer.ranks; ++r) workers.push_back(std::make_unique<Worker>(layer, group, r));
  group.run([&](int r) { workers[static_cast<size_t>(r)]->run(); });
  for (int r = 0; r < layer.ranks; ++r) {
    SCOPED_TRACE(r);
    EXPECT_EQ(workers[static_cast<size_t>(r)]->allocations, 0);
    EXPECT_TRUE(workers[static_cast<size_t>(r)]->untouched);
    const Layer::Results &got = layer.rank[static_cast<size_t>(r)], &want = direct[static_cast<size_t>(r)];
    // bf16 gradients are rounded each time that something is added to them.
    const double gradients = layer.gradient == Type::bf16 ? 0.05 : 1e-5;
    expect_near(got.y, want.y, 1e-5);
    expect_near(got.dx, want.dx, 1e-5);
    expect_near(got.d_gates, want.d_gates, 1e-5);
    expect_near(got.dw, want.dw, gradients);
    expect_near(got.db, want.db, gradients);
  }
  return {workers[0]->passes, workers[0]->rounds};
}

TEST(Routing, RandomLayersEqualTheirDefinition) {
  std::mt19937_64 random(1);
  int more_passes = 0, more_rounds = 0;
  for (int trial = 0; trial < 120; ++trial) {
    SCOPED_TRACE(trial);
    Layer layer;
    layer.ranks = static_cast<int>(pick(random, 1, 8));
    layer.experts = layer.ranks * pick(random, 1, 6);
    layer.k = pick(random, 1, std::min<int64_t>(layer.experts, 6));
    layer.n = pick(random, 1, 30);
    layer.width = pick(random, 1, 9), layer.out = pick(random, 1, 9);
    layer.capacity = layer.ranks + pick(random, 0, 40);
    layer.slots = static_cast<int>(pick(random, 1, 2));
    layer.options.alpha = pick(random, 0, 1) == 0 ? 1.0 : 0.6;
    layer.options.min_rows = pick(random, 1, 6);
    layer.options.lambda = pick(random, 0, 4) == 0 ? plan::kNeverSpill : 1.0;
    layer.type = trial % 3 == 0 ? Type::bf16 : Type::f32;
    layer.gradient = trial % 6 == 0 ? Type::bf16 : Type::f32;
    layer.accumulate = trial % 4 == 1;
    layer.fill(random, pick(random, 0, 10));
    const Seen seen = check(layer);
    if (HasFailure()) return;
    more_passes += seen.passes > 1;
    more_rounds += seen.rounds > 1;
  }
  EXPECT_GT(more_passes, 20) << more_passes;
  EXPECT_GT(more_rounds, 60);
}

TEST(Routing, AllTokensToOneExpert) {
  for (const bool spill : {false, true}) {
    std::mt19937_64 random(2);
    Layer layer;
    layer.ranks = 8, layer.experts = 16, layer.n = 40, layer.width = 5, layer.out = 4, layer.capacity = 16;
    layer.options = {.min_rows = 4, .lambda = spill ? 1.3 : plan::kNeverSpill};
    layer.fill(random, 10);
    const Seen seen = check(layer);
    EXPECT_EQ(seen.passes, 1);
    EXPECT_EQ(seen.rounds, spill ? 3 : 20);
  }
}

TEST(Routing, SeveralPassesOfSpills) {
  // The first two ranks own all experts that anyone wants: each other rank borrows several.
  std::mt19937_64 random(3);
  Layer layer;
  layer.ranks = 4, layer.experts = 32, layer.k = 8, layer.n = 24, layer.width = 6, layer.out = 3;
  layer.capacity = 32;
  layer.options = {.min_rows = 1, .lambda = 1};
  layer.fill(random, 10);
  EXPECT_GE(check(layer).passes, 2);
}

TEST(Routing, RowsLieByExpertThenSourceThenToken) {
  std::mt19937_64 random(4);
  const int ranks = 3, experts = 6, n = 20, k = 2, capacity = 16;
  Layer layer;  // only for its ids
  layer.ranks = ranks, layer.experts = experts, layer.n = n, layer.k = k;
  layer.fill(random, 5);
  std::atomic<int> rows_seen = 0;
  Group group(ranks);
  group.run([&](int r) {
    Workspace workspace(1 << 14);
    const model::ModelConfig model;
    const Constants constants{model, {}, {.min_rows = 2, .lambda = 1}, capacity, 2};
    Tensor x(Type::f32, n, 2), order(Type::i32, 1, n * k), counts(Type::i32, 1, experts),
        all(Type::i32, ranks, experts),
        rounds(Type::i32, 1, plan::round_plan_bytes(ranks, experts, 2) / 4 + 1), sent(Type::f32, capacity, 2),
        here(Type::f32, capacity, 2), back(Type::f32, capacity, 2);
    for (int64_t t = 0; t < n; ++t) x.set(t, 0, r), x.set(t, 1, static_cast<double>(t));
    const Tensor& ids = layer.rank[static_cast<size_t>(r)].ids;
    run_routed(TestCall(OpKind::sort, {}, {ids.operand()}, {order.operand(), counts.operand()}).get(),
               constants, workspace);
    // order is the stable order of the ids.
    std::vector<int> expected(n * k);
    std::iota(expected.begin(), expected.end(), 0);
    std::ranges::stable_sort(expected, {}, [&](int copy) { return ids.at(copy); });
    for (int64_t i = 0; i < n * k; ++i) ASSERT_EQ(order.at(i), expected[i]);
    for (int e = 0; e < experts; ++e) {
      int64_t count = 0;
      for (int64_t i = 0; i < n * k; ++i) count += ids.at(i) == e;
      ASSERT_EQ(counts.at(e), static_cast<double>(count));
    }

    group.collective({OpKind::all_gather, {}, {counts.operand()}, {all.operand()}, r, ranks}, workspace);
    run_routed(TestCall(OpKind::plan_routing, {}, {all.operand()}, {rounds.operand()}, r, ranks).get(),
               constants, workspace);
    const plan::RoundPlan& plan = round_plan(rounds.operand());
    for (int round = 0; round < plan.rounds(); ++round) {
      run_routed(TestCall(OpKind::permute, {}, {x.operand(), order.operand(), rounds.operand()},
                          {sent.operand()}, r, ranks, round)
                     .get(),
                 constants, workspace);
      group.collective({OpKind::all_to_all,
                        {.exchange = Exchange::dispatch},
                        {rounds.operand(), sent.operand()},
                        {here.operand()},
                        r,
                        ranks,
                        round},
                       workspace);
      const TestCall at(OpKind::swiglu, {}, {}, {}, r, ranks, round);
      int64_t next = 0;
      const auto work = plan.work(plan.pass_of(round), r);
      const auto borrowed = plan.transfers(plan.pass_of(round));
      size_t item = 0;
      for_each_expert(at.get(), rounds.operand(), [&](int64_t first, int64_t last, int own, int slot) {
        ASSERT_EQ(first, next);
        ASSERT_LT(first, last);
        int expert = own < 0 ? -1 : own + r * (experts / ranks);
        if (own < 0)
          for (int seen = 0; const plan::WeightTransfer& t : borrowed)
            if (t.to == r && seen++ == slot) expert = t.expert;
        ASSERT_EQ(own < 0, plan::owner(expert, experts, ranks) != r);
        while (item < work.size() && work[item].expert != expert) ++item;  // in order of the work
        ASSERT_LT(item, work.size());
        std::pair<double, double> before{-1, -1};
        for (int64_t row = first; row < last; ++row) {
          const std::pair<double, double> token{here.at(row, 0), here.at(row, 1)};
          ASSERT_LT(before, token);
          before = token;
          const Tensor& their = layer.rank[static_cast<size_t>(token.first)].ids;
          const auto t = static_cast<int64_t>(token.second);
          ASSERT_TRUE(their.at(t, 0) == expert || their.at(t, 1) == expert);
          ++rows_seen;
        }
        next = last;
      });
      ASSERT_EQ(next, rows_of_round(at.get(), rounds.operand()));
      // The way back gives each row to whom it came from, at its place.
      group.collective({OpKind::all_to_all,
                        {.exchange = Exchange::combine},
                        {rounds.operand(), here.operand()},
                        {back.operand()},
                        r,
                        ranks,
                        round},
                       workspace);
      int64_t sends = 0;
      for (int d = 0; d < ranks; ++d) sends += plan.rows_between(round, r, d);
      for (int64_t i = 0; i < 2 * sends; ++i) ASSERT_EQ(back.at(i), sent.at(i));
    }
  });
  EXPECT_EQ(rows_seen, ranks * n * k);
}

// One expert has a single row, in one of the rounds, another has none.
TEST(Routing, GradientsOfExpertsWithoutRowsBecomeZero) {
  std::mt19937_64 random(5);
  for (const bool accumulate : {false, true}) {
    Layer layer;
    layer.experts = 3, layer.n = 9, layer.width = 4, layer.out = 3, layer.capacity = 2;
    layer.accumulate = accumulate;
    layer.fill(random, 0);
    for (int64_t t = 0; t < layer.n; ++t) layer.rank[0].ids.set(t, t == 7 ? 1 : 0);
    EXPECT_EQ(check(layer).rounds, 5);
  }
}

TEST(Routing, NothingRoutedDoesNothing) {  // a repeat region runs once all the same
  Tensor counts(Type::i32, 2, 4), rounds(Type::i32, 1, 4096), order(Type::i32, 1, 0), x(Type::f32, 4, 3);
  x.fill(5);
  Workspace workspace(multiply_bytes() + (1 << 14));
  const model::ModelConfig model;
  const Constants constants{model, {}, {}, 8, 1};
  run_routed(TestCall(OpKind::plan_routing, {}, {counts.operand()}, {rounds.operand()}, 1, 2).get(),
             constants, workspace);
  const TestCall call(OpKind::permute, {.first_round = true},
                      {x.operand(), order.operand(), rounds.operand()}, {x.operand()}, 1, 2);
  EXPECT_EQ(rows_of_round(call.get(), rounds.operand()), 0);
  EXPECT_FALSE(acts(call.get(), round_plan(rounds.operand())));
  for_each_expert(call.get(), rounds.operand(), [](int64_t, int64_t, int, int) { FAIL(); });
  run_routed(call.get(), constants, workspace);
  for (int64_t i = 0; i < x.elements(); ++i) EXPECT_EQ(x.at(i), 5);
  // But for gradients of weights: there are none.
  Tensor dw(Type::f32, 3, 3, 2), db(Type::f32, 1, 3, 2);
  for (const bool accumulate : {true, false}) {
    for (Tensor* t : {&dw, &db}) t->fill(5);
    run_routed(TestCall(OpKind::grouped_gemm, {.accumulate = accumulate, .transpose_a = true},
                        {x.operand(), x.operand(), rounds.operand()}, {dw.operand()}, 1, 2)
                   .get(),
               constants, workspace);
    run_routed(TestCall(OpKind::expert_bias_bwd, {.accumulate = accumulate}, {x.operand(), rounds.operand()},
                        {db.operand()}, 1, 2)
                   .get(),
               constants, workspace);
    for (int64_t i = 0; i < dw.elements(); ++i) EXPECT_EQ(dw.at(i), accumulate ? 5 : 0);
    for (int64_t i = 0; i < db.elements(); ++i) EXPECT_EQ(db.at(i), accumulate ? 5 : 0);
  }
}

TEST(Routing, ActsAtTheEndsOfAPass) {
  // Two experts a rank; the hot ones of rank 0 spill to rank 1, one a pass.
  Tensor counts(Type::i32, 2, 4), rounds(Type::i32, 1, 4096);
  for (const int source : {0, 1}) counts.set(source, 0, 30), counts.set(source, 1, 30);
  Workspace workspace(1 << 14);
  const model::ModelConfig model;
  const Constants constants{model, {}, {.alpha = 0.4, .min_rows = 1, .lambda = 1}, 8, 1};
  run_routed(TestCall(OpKind::plan_routing, {}, {counts.operand()}, {rounds.operand()}, 0, 2).get(),
             constants, workspace);
  const plan::RoundPlan& plan = round_plan(rounds.operand());
  ASSERT_EQ(plan.passes(), 2);
  int firsts = 0, lasts = 0;
  for (int round = 0; round < plan.rounds(); ++round) {
    const bool first = round == 0 || plan.pass_of(round) != plan.pass_of(round - 1);
    const bool last = round + 1 == plan.rounds() || plan.pass_of(round) != plan.pass_of(round + 1);
    EXPECT_EQ(acts(TestCall(OpKind::all_to_all, {.first_round = true}, {}, {}, 0, 2, round).get(), plan),
              first);
    EXPECT_EQ(acts(TestCall(OpKind::all_to_all, {.last_round = true}, {}, {}, 0, 2, round).get(), plan),
              last);
    EXPECT_TRUE(acts(TestCall(OpKind::all_to_all, {}, {}, {}, 0, 2, round).get(), plan));
    firsts += first, lasts += last;
  }
  EXPECT_EQ(firsts, 2);
  EXPECT_EQ(lasts, 2);
  EXPECT_GT(plan.rounds(), 4);
}

TEST(Routing, Errors) {
  Workspace workspace(1 << 14);
  const model::ModelConfig model;
  const auto plan_with = [&](int64_t ranks, int64_t elements, int64_t capacity) {
    Tensor counts(Type::i32, ranks, ranks), rounds(Type::i32, 1, elements);
    const Constants constants{model, {}, {}, capacity, 1};
    run_routed(TestCall(OpKind::plan_routing, {}, {counts.operand()}, {rounds.operand()}).get(), constants,
               workspace);
  };
  EXPECT_NO_THROW(plan_with(4, plan::round_plan_bytes(4, 4, 1) / 4 + 1, 4));
  EXPECT_THROW(plan_with(4, plan::round_plan_bytes(4, 4, 1) / 4 - 1, 4), InternalError);  // too little memory
  EXPECT_THROW(plan_with(4, plan::round_plan_bytes(4, 4, 1) / 4 + 1, 3), UserError);  // fewer rows than ranks
  EXPECT_THROW(plan_with(kMostExpertRanks + 1, 1, 1 << 20), UserError);
  Tensor ids(Type::i32, 2, 1), order(Type::i32, 1, 2), counts(Type::i32, 1, 3);
  for (const int bad : {3, -1}) {
    ids.set(1, bad);
    const TestCall call(OpKind::sort, {}, {ids.operand()}, {order.operand(), counts.operand()});
    EXPECT_THROW(run_routed(call.get(), {model, {}, {}}, workspace), InternalError);
  }
  const TestCall call(OpKind::gemm, {}, {}, {});
  EXPECT_THROW(run_routed(call.get(), {model, {}, {}}, workspace), InternalError);
}

}  // namespace
}  // namespace mop::cpu::test
