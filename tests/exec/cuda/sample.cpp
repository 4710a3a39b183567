#include "tests/exec/cuda/sample.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "exec/cpu/routing.h"
#include "exec/cpu/tensor.h"
#include "exec/cpu/workspace.h"
#include "exec/cuda/memory.h"
#include "exec/cuda/rank.h"
#include "exec/interpreter/interpreter.h"
#include "exec/launch/peers.h"
#include "kernels/check.h"

namespace mop::cuda::testing {

namespace {

constexpr std::byte kPoison{0xFF};  // NaN in every floating type
constexpr int64_t kMargin = 64;     // bytes behind every operand that belong to nobody

int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

// f(address, index of the element) for every element of a view.
template <class F>
void for_each_element(const program::View& v, std::byte* data, F&& f) {
  for (int64_t m = 0, i = 0; m < v.count; ++m)
    for (int64_t r = 0; r < v.rows; ++r)
      for (int64_t c = 0; c < v.cols; ++c, ++i)
        f(data + (m * v.stride + r * v.ld + c) * program::size_of(v.type), static_cast<size_t>(i));
}

double load(const std::byte* from, Type type) {
  double value = 0;
  cpu::convert({const_cast<std::byte*>(from), 1, type}, {reinterpret_cast<std::byte*>(&value), 1, Type::f64});
  return value;
}

// A program's memory in this process, and the same on a GPU.
class Image {
 public:
  Image(const program::StepProgram& program, const std::vector<Sample::Tensor>& tensors)
      : plan_(interpreter::plan_memory(program)),
        hbm_(plan_.arenas.hbm.bytes),
        host_(plan_.arenas.host.bytes),
        memory_(program, plan_, hbm_.data(), host_.data()),
        program_(program),
        tensors_(tensors) {
    for (const auto& bytes : all()) std::ranges::fill(bytes, kPoison);
    for (const Sample::Tensor& t : tensors_)
      for_each_element(t.operand.view, at(t.operand), [&](std::byte* to, size_t i) {
        double value = t.values[i];
        if (!std::isnan(value))
          cpu::convert({reinterpret_cast<std::byte*>(&value), 1, Type::f64}, {to, 1, t.operand.view.type});
      });
    for (const auto& bytes : all()) before_.emplace_back(bytes.begin(), bytes.end());
  }

  const interpreter::MemoryPlan& plan() const { return plan_; }
  const interpreter::Memory& memory() const { return memory_; }
  std::array<std::span<std::byte>, 2> all() const {
    return {std::span(hbm_.data(), static_cast<size_t>(plan_.arenas.hbm.bytes)),
            std::span(host_.data(), static_cast<size_t>(plan_.arenas.host.bytes))};
  }

  Outcome outcome() const {
    Outcome outcome;
    for (const Sample::Tensor& t : tensors_) {
      Values& values = outcome.emplace_back(t.values.size());
      for_each_element(t.operand.view, at(t.operand),
                       [&](const std::byte* from, size_t i) { values[i] = load(from, t.operand.view.type); });
    }
    return outcome;
  }

  // Only what operations write has changed.
  void expect_rest_untouched(const char* who) {
    for (const program::Use& use : program_.uses)
      if (use.write && use.buffer != program::kNoBuffer)
        for_each_element(use.view, at({use.buffer, use.view}), [&](std::byte* element, size_t) {
          const auto bytes = static_cast<size_t>(program::size_of(use.view.type));
          std::memcpy(element, before(element), bytes);
        });
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const Sample::Tensor& t = tensors_[i];
      const auto bytes = static_cast<size_t>(memory_.slot_bytes(t.operand.buffer));
      const std::byte* const now = memory_.at(t.operand.buffer, 0);
      const size_t changed = static_cast<size_t>(std::mismatch(now, now + bytes, before(now)).first - now);
      EXPECT_EQ(changed, bytes) << who << ": byte " << changed << " of operand " << i
                                << ", which has its elements from byte " << t.operand.view.offset
                                << " on, was written";
    }
  }

 private:
  std::byte* at(const Operand& operand) const { return memory_.at(operand.buffer, 0) + operand.view.offset; }
  const std::byte* before(const std::byte* now) const {
    const bool host = now >= host_.data() && now < host_.data() + plan_.arenas.host.bytes;
    return before_[host ? 1 : 0].data() + (now - (host ? host_ : hbm_).data());
  }

  interpreter::MemoryPlan plan_;
  interpreter::HostBytes hbm_, host_;
  interpreter::Memory memory_;
  const program::StepProgram& program_;
  const std::vector<Sample::Tensor>& tensors_;
  std::vector<std::vector<std::byte>> before_;
};

cpu::Constants constants_of(const Sample& s) {
  return {s.model, s.rope, s.least_loaded, s.round_rows, s.spill_slots};
}

// Runs what it is given at once, in the order in which it comes.
class Direct final : public interpreter::Backend {
 public:
  Direct(const program::StepProgram& program, const cpu::Constants& constants)
      : constants_(constants), workspace_(cpu::workspace_bytes(program)) {}
  void reserve(uint32_t) override {}
  void launch(Stream, const interpreter::Launch& launch) override {
    cpu::run(launch.call, constants_, launch.step, workspace_);
  }
  void record(Stream, uint32_t) override {}
  void wait(Stream, uint32_t) override {}
  int64_t rounds(uint32_t, const interpreter::Call& plan) override {
    return std::max(1, cpu::round_plan(plan.out[0]).rounds());
  }
  void synchronize() override {}

 private:
  const cpu::Constants& constants_;
  cpu::Workspace workspace_;
};

program::View widened(program::View view) {
  if (view.type != Type::bf16) return view;
  view.type = Type::f32;
  view.offset *= 2;
  view.rank_stride *= 2;
  return view;
}

double ulp(double value) {  // of bf16: 8 bits of mantissa
  if (value == 0 || !std::isfinite(value)) return 0;
  int exponent = 0;
  std::frexp(value, &exponent);
  return std::ldexp(1.0, exponent - 8);
}

}  // namespace

Sample::Sample(int seed)
    : random_(static_cast<uint64_t>(seed) * 7919 + 17),
      odd_(seed % 3 == 2),
      gaps_(seed % 3 != 0),
      real_(seed / 3 % 2 == 0 ? Type::bf16 : Type::f32) {
  model.norm_eps = 1e-3;
  model.top_k = 1;
  model.experts = 1;
  model.layers = 1, model.moe = {true};  // all operations are of layer 0
  step.data = this;
  builder_.at(program::Phase::forward, 0);
}

int64_t Sample::size(int64_t least, int64_t most) {
  const int64_t any = number(least, most);
  return odd_ ? any : round_up(std::max<int64_t>(any, 1), 8);
}

Values Sample::normal_values(int64_t n, double scale) {
  std::normal_distribution<double> distribution(0, scale);
  Values values(static_cast<size_t>(n));
  for (double& v : values) v = distribution(random_);
  return values;
}

Values Sample::whole_values(int64_t n, int64_t least, int64_t most) {
  Values values(static_cast<size_t>(n));
  for (double& v : values) v = static_cast<double>(number(least, most));
  return values;
}

Operand Sample::of(Type type, int64_t rows, int64_t cols, Values values, Layout layout) {
  const auto gap = [&] { return layout.dense || !gaps_ ? 0 : odd_ ? number(0, 5) : 8 * number(0, 2); };
  program::View v;
  v.type = type;
  v.rows = rows;
  v.cols = cols;
  v.ld = layout.ld > 0 ? layout.ld : cols + (rows > 1 ? gap() : 0);
  v.count = layout.count;
  v.stride = rows * v.ld + (layout.count > 1 ? gap() : 0);
  v.offset = gap() * program::size_of(type);
  const int64_t bytes = v.offset + interpreter::extent(v) + kMargin;
  const program::BufferId buffer =
      builder_.persistent("operand", bytes, program::Holds::other_activations, -1, layout.space);
  EXPECT_EQ(std::ssize(values), v.elements());
  tensors_.push_back({{buffer, v}, std::move(values), {}});
  return tensors_.back().operand;
}

void Sample::expect(const Operand& output, Tolerance tolerance) {
  tensors_[output.buffer].tolerance = tolerance;
}
void Sample::opaque(const Operand& output) {
  tensors_[output.buffer].opaque = true;
}
void Sample::heads_first(const Operand& lse, int64_t context) {
  tensors_[lse.buffer].context = context;
}

void Sample::group(int64_t ranks, int rank) {
  group_ = builder_.group(program::Axis::expert, ranks, 1);
  rank_ = rank;
}

program::OpId Sample::op(OpKind kind, Does does, std::vector<Operand> reads, std::vector<Operand> writes,
                         Stream stream, program::Shape shape) {
  for (const Operand& output : writes)
    if (output.buffer != program::kNoBuffer) tensors_[output.buffer].written = true;
  program::OpSpec spec{kind, stream, program::Component::other, shape, group_};
  spec.does = does;
  return builder_.op(spec, reads, writes);
}

void Sample::finish() {
  program_ = builder_.finish();
  program_.runnable = true;
  program_.round_rows = round_rows;
  program_.spill_slots = spill_slots;
}

void Sample::fill(int64_t micro, const interpreter::Batch& batch) {
  const auto& from = batches.at(static_cast<size_t>(micro));
  std::ranges::copy(from[0], batch.ids.begin());
  std::ranges::copy(from[1], batch.targets.begin());
  std::ranges::copy(from[2], batch.positions.begin());
  std::ranges::copy(from[3], batch.starts.begin());
}

Outcome run_on_cpu(Sample& sample, bool wide) {
  program::StepProgram program = sample.program();
  std::vector<Sample::Tensor> tensors = sample.tensors();
  if (wide) {
    for (Sample::Tensor& t : tensors) {
      // Inputs are what bf16 can hold.
      if (t.operand.view.type == Type::bf16) {
        program.buffers[t.operand.buffer].bytes *= 2;
        for (double& v : t.values)
          if (!std::isnan(v)) {
            uint16_t narrow = 0;
            const cpu::Run rounded{reinterpret_cast<std::byte*>(&narrow), 1, Type::bf16};
            cpu::convert({reinterpret_cast<std::byte*>(&v), 1, Type::f64}, rounded);
            v = load(rounded.data, Type::bf16);
          }
      }
      t.operand.view = widened(t.operand.view);
    }
    for (program::Use& use : program.uses) use.view = widened(use.view);
  }
  Image image(program, tensors);
  const cpu::Constants constants = constants_of(sample);
  Direct backend(program, constants);
  interpreter::Interpreter(program, image.memory(), backend, sample.rank()).run(sample.step);
  Outcome outcome = image.outcome();
  image.expect_rest_untouched(wide ? "CPU, widened" : "CPU");
  return outcome;
}

Outcome run_on_gpu(Sample& sample) {
  kernels::check(cudaSetDevice(0), "the device");
  Image image(sample.program(), sample.tensors());
  const auto [hbm, host] = image.all();
  const DeviceBytes device = device_bytes(std::ssize(hbm), "a test");
  const PinnedBytes pinned = pinned_bytes(std::ssize(host), "a test");
  const interpreter::Memory memory(sample.program(), image.plan(), device.get(), pinned.get());
  const cpu::Constants constants = constants_of(sample);
  const std::unique_ptr<launch::Peers> peers = launch::alone();
  Rank rank(
      0, sample.rank(), sample.program(), memory, constants,
      std::make_unique<Communicators>(sample.program(), *peers, [](const program::Op&) { return false; }),
      std::make_unique<PeerMemory>(sample.program(), device.get(), *peers), 0);
  interpreter::Interpreter interpreter(sample.program(), memory, rank, sample.rank());
  const std::vector<std::byte> before_hbm(hbm.begin(), hbm.end()), before_host(host.begin(), host.end());
  std::vector<std::byte> first;
  for (int run = 0; run < 2; ++run) {
    kernels::check(cudaMemcpy(device.get(), before_hbm.data(), before_hbm.size(), cudaMemcpyHostToDevice),
                   "operands");
    std::ranges::copy(before_host, pinned.get());
    kernels::check(cudaDeviceSynchronize(), "operands");
    interpreter.run(sample.step);
    rank.synchronize();
    kernels::check(cudaMemcpy(hbm.data(), device.get(), hbm.size(), cudaMemcpyDeviceToHost), "results");
    std::copy_n(pinned.get(), host.size(), host.begin());
    if (run == 0) {
      first.assign(hbm.begin(), hbm.end());
    } else if (sample.fixed_order) {
      EXPECT_TRUE(std::ranges::equal(first, hbm)) << "the second run gave other bits than the first";
    }
  }
  Outcome outcome = image.outcome();
  image.expect_rest_untouched("GPU");
  for (size_t i = 0; i < outcome.size(); ++i) {
    const Sample::Tensor& t = sample.tensors()[i];
    if (t.context == 0) continue;
    const Values all = outcome[i];
    const int64_t heads = t.operand.view.cols;
    for (int64_t row = 0, at = 0; row < t.operand.view.rows; ++row)
      for (int64_t head = 0; head < heads; ++head, ++at)
        outcome[i][static_cast<size_t>(at)] =
            all[static_cast<size_t>((row / t.context * heads + head) * t.context + row % t.context)];
  }
  return outcome;
}

void expect_alike(const Sample& sample, const Outcome& expected, const Outcome& actual, double more_ulps) {
  std::string kinds;
  for (const program::Op& op : sample.program().ops) kinds += fmt::format(" {}", program::name(op.kind));
  for (size_t i = 0; i < expected.size(); ++i) {
    const Sample::Tensor& t = sample.tensors()[i];
    if (!t.written || t.opaque) continue;
    const Type type = t.operand.view.type;
    const bool whole = type == Type::i32;
    double squares = 0, difference = 0;
    int64_t numbers = 0;
    for (size_t e = 0; e < expected[i].size(); ++e)
      if (std::isfinite(expected[i][e])) {
        squares += expected[i][e] * expected[i][e];
        difference += std::pow(actual[i][e] - expected[i][e], 2);
        ++numbers;
      }
    const double typical = numbers == 0 ? 0 : std::sqrt(squares / static_cast<double>(numbers));
    const double ulps = type != Type::bf16 ? 0 : t.tolerance.ulps + more_ulps;
    for (size_t e = 0; e < expected[i].size(); ++e) {
      const double want = expected[i][e], got = actual[i][e];
      if (got == want || (std::isnan(got) && std::isnan(want))) continue;
      const double allowed = whole
                                 ? 0
                                 : t.tolerance.floor + t.tolerance.noise * std::max(std::abs(want), typical) +
                                       ulps * ulp(std::max(std::abs(want), std::abs(got)));
      if (std::abs(got - want) <= allowed) continue;
      const program::View& v = t.operand.view;
      const auto at = static_cast<int64_t>(e);
      ADD_FAILURE() << "operand " << i << " (" << program::name(type) << " " << v.count << " x " << v.rows
                    << " x " << v.cols << ", ld " << v.ld << ") of" << kinds << ": element ("
                    << at / v.cols / v.rows << ", " << at / v.cols % v.rows << ", " << at % v.cols << ") is "
                    << got << ", not " << want << " within " << allowed << "; typical are " << typical;
      break;
    }
    if (t.tolerance.norm > 0) {
      EXPECT_LE(std::sqrt(difference), t.tolerance.norm * std::sqrt(squares))
          << "operand " << i << " of" << kinds;
    }
  }
}

Routed route(Sample& s, bool one_round) {
  Routed r;
  r.ranks = s.one_of<int64_t>({1, 2, 4});
  const int rank = static_cast<int>(s.number(0, r.ranks - 1));
  r.experts = r.ranks * s.number(1, 8);
  r.tokens = s.number(1, 150);
  r.k = s.number(1, std::min<int64_t>(r.experts, 4));
  s.model.experts = r.experts;
  s.model.top_k = r.k;
  // Tokens of every rank; one expert, its owner's only load or not, may get most of them or none.
  const int64_t hot = s.number(0, r.experts - 1), share = s.one_of<int64_t>({0, 9, 10});
  const bool shunned = s.coin();
  std::vector<Values> ids;
  Values counts(static_cast<size_t>(r.ranks * r.experts), 0);
  for (int64_t source = 0; source < r.ranks; ++source) {
    Values& mine = ids.emplace_back();
    for (int64_t t = 0; t < r.tokens; ++t) {
      std::vector<int64_t> order(static_cast<size_t>(r.experts));
      std::iota(order.begin(), order.end(), 0);
      for (size_t i = order.size(); i > 1; --i)
        std::swap(order[i - 1], order[static_cast<size_t>(s.number(0, static_cast<int64_t>(i) - 1))]);
      const auto to = std::ranges::find(order, hot);
      if (s.number(0, 9) < share)
        std::iter_swap(order.begin(), to);
      else if (shunned)
        std::iter_swap(order.end() - 1, to);
      for (int64_t i = 0; i < r.k; ++i) {
        mine.push_back(static_cast<double>(order[static_cast<size_t>(i)]));
        ++counts[static_cast<size_t>(source * r.experts + order[static_cast<size_t>(i)])];
      }
    }
  }
  const int64_t all = r.ranks * r.tokens * r.k;
  const bool spills = r.ranks > 1 && s.coin();
  s.least_loaded = {1.0, 1, spills ? 1.0 : plan::kNeverSpill};
  s.spill_slots = one_round ? static_cast<int>(r.experts) : static_cast<int>(s.number(1, 3));
  r.capacity = one_round ? all : std::max(r.ranks, s.number(std::max<int64_t>(1, all / r.ranks / 3), all));
  s.round_rows = r.capacity;

  // As the operations will plan it.
  std::vector<int32_t> numbers(counts.begin(), counts.end());
  plan::Counts sums(static_cast<int>(r.ranks), static_cast<int>(r.experts), numbers,
                    std::pmr::get_default_resource());
  const plan::LeastLoadedPlan assigned =
      plan::least_loaded(sums.loads(), static_cast<int>(r.ranks), s.least_loaded);
  const plan::RoundPlan plan(sums, assigned, r.capacity, s.spill_slots);
  r.times = plan.rounds();
  for (int round = 0; round < plan.rounds(); ++round) {
    int64_t sent = 0;
    plan.for_each_sent(round, rank, [&](const plan::Flow& flow) { sent += flow.rows(); });
    r.sent = std::max(r.sent, sent);
    r.computed = std::max(r.computed, plan.rows_received(round, rank));
  }

  s.group(r.ranks, rank);
  r.order = s.blank(Type::i32, 1, r.tokens * r.k, {.dense = true});
  const Operand own = s.blank(Type::i32, 1, r.experts, {.dense = true});
  s.op(OpKind::sort, {}, {s.whole(r.tokens, r.k, ids[static_cast<size_t>(rank)])}, {r.order, own});
  const int64_t bytes =
      plan::round_plan_bytes(static_cast<int>(r.ranks), static_cast<int>(r.experts), s.spill_slots);
  r.rounds = s.blank(Type::i32, 1, bytes / 4, {.dense = true});
  s.opaque(r.rounds);
  const Operand gathered = r.ranks == 1 ? own : s.whole(r.ranks, r.experts, counts);
  r.plan = s.op(OpKind::plan_routing, {}, {gathered}, {r.rounds});
  return r;
}

}  // namespace mop::cuda::testing
