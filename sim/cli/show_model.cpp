#include <fmt/format.h>

#include <memory>
#include <nlohmann/json.hpp>

#include "sim/base/quantity.h"
#include "sim/cli/commands.h"
#include "sim/cli/flags.h"
#include "sim/cli/text.h"

namespace mop::cli {
namespace {

using Json = nlohmann::ordered_json;

struct Line {
  const char* component;
  int64_t parameters, active;
  double flops;  // a token, forward and backward
};

std::vector<Line> lines(const model::ModelConfig& m, const model::Parameters& all,
                        const model::Flops& flops) {
  model::LayerParameters sum;
  for (const model::LayerParameters& layer : all.layers) {
    sum.attention += layer.attention;
    sum.norms += layer.norms;
    sum.router += layer.router;
    sum.shared += layer.shared;
    sum.dense_mlp += layer.dense_mlp;
    sum.experts += layer.experts;
  }
  return {{"embedding", all.embedding, all.embedding, 0},
          {"attention", sum.attention, sum.attention, flops.attention + flops.projections},
          {"norms", sum.norms + all.final_norm, sum.norms + all.final_norm, 0},
          {"router", sum.router, sum.router, flops.router},
          {"shared_experts", sum.shared, sum.shared, flops.shared},
          {"dense_mlp", sum.dense_mlp, sum.dense_mlp, flops.dense_mlp},
          {"experts", sum.experts, m.experts == 0 ? 0 : sum.experts / m.experts * m.top_k, flops.experts},
          {"head", all.head, all.head, flops.head}};
}

void print_json(const model::ModelConfig& m, const model::Parameters& all, const model::Flops& flops,
                int64_t context) {
  Json json{{"model", m.name},
            {"model_type", m.model_type},
            {"layers", m.layers},
            {"moe_layers", m.moe_layers()},
            {"hidden", m.hidden},
            {"vocabulary", m.vocab},
            {"max_positions", m.max_positions},
            {"tied_head", m.tied_head},
            {"attention", m.attention == model::Attention::mla ? "mla" : "gqa"},
            {"heads", m.heads},
            {"kv_heads", m.kv_heads},
            {"qk_dim", m.qk_dim()},
            {"v_dim", m.v_dim()},
            {"experts", m.experts},
            {"top_k", m.top_k},
            {"expert_intermediate", m.expert_intermediate},
            {"shared_experts", m.shared_experts},
            {"dense_intermediate", m.dense_intermediate},
            {"window", m.window},
            {"context", context},
            {"parameters_total", all.total},
            {"parameters_active", all.active},
            {"parameters_active_without_embedding", all.active_without_embedding},
            {"flops_per_token", flops.total()}};
  for (const Line& line : lines(m, all, flops)) {
    json["parameters_by_component"][line.component] = line.parameters;
    json["active_by_component"][line.component] = line.active;
    json["flops_by_component"][line.component] = line.flops;
  }
  fmt::print("{}\n", json.dump(2));
}

void print_text(const model::ModelConfig& m, const model::Parameters& all, const model::Flops& flops,
                int64_t context) {
  fmt::print("{} ({}): {} layers, {} of them MoE; hidden {}, vocabulary {}{}\n", m.name, m.model_type,
             m.layers, m.moe_layers(), m.hidden, m.vocab, m.tied_head ? ", tied head" : "");
  fmt::print("{} attention: {} heads, {} KV heads, q and k {} wide, v {}\n",
             m.attention == model::Attention::mla ? "latent" : "grouped-query", m.heads, m.kv_heads,
             m.qk_dim(), m.v_dim());
  int64_t windowed = 0, window = 0;
  for (const int64_t w : m.window)
    if (w > 0) ++windowed, window = w;
  if (windowed > 0) fmt::print("{} layers see a window of {} tokens\n", windowed, window);
  fmt::print("{} experts of width {}, {} a token, {} shared\n\n", m.experts, m.expert_intermediate, m.top_k,
             m.shared_experts);
  TextTable table({"component", "parameters", "active a token", "GFLOP/token", "share"}, "lrrrr");
  const auto grouped = [](int64_t n) {
    std::string text = std::to_string(n);
    for (int at = static_cast<int>(text.size()) - 3; at > 0; at -= 3)
      text.insert(static_cast<size_t>(at), 1, ',');
    return text;
  };
  for (const Line& line : lines(m, all, flops))
    table.add({line.component, grouped(line.parameters), grouped(line.active),
               fmt::format("{:.3f}", line.flops / 1e9), percent(line.flops / flops.total())});
  table.add({"total", grouped(all.total), grouped(all.active), fmt::format("{:.3f}", flops.total() / 1e9),
             percent(1)});
  fmt::print(
      "{}\nactive without the embedding: {}\nFLOPs are of forward and backward at context {}, attention "
      "causal\n",
      table.text(), grouped(all.active_without_embedding), format_count(context));
}

}  // namespace

void add_show_model(CLI::App& show) {
  CLI::App* command = show.add_subcommand("model", "parameters and FLOPs by component");
  command->footer(
      "Example:\n  mop show model --model deepseek-v3 --context 128K\n  mop show model --model ./config.json "
      "--format json");
  const auto flags = std::make_shared<Flags>(*command, Flags::Values::one, std::vector<std::string>{"mop"});
  command->callback([flags] {
    flags->read_file();
    const predict::Scenario s = flags->scenario();
    const model::Parameters parameters = model::count_parameters(s.model);
    const model::Flops flops = model::flops_per_token(s.model, s.workload.context);
    (flags->json() ? print_json : print_text)(s.model, parameters, flops, s.workload.context);
  });
}

}  // namespace mop::cli
