#include <fmt/format.h>

#include <memory>
#include <nlohmann/json.hpp>

#include "sim/cli/answer.h"
#include "sim/cli/commands.h"
#include "sim/cli/flags.h"
#include "sim/cli/text.h"
#include "sim/search/planner.h"
#include "sim/search/settings.h"

namespace mop::cli {
namespace {

using Json = nlohmann::ordered_json;

struct GroupLine {
  const char* name;
  plan::Span span;
  const char* shares;
};

std::vector<GroupLine> groups(const plan::Plan& plan, const plan::Layout& l) {
  if (plan.family == plan::Family::fsdp2)
    return {{"tensor", l.tensor, "weights of a layer by columns and rows, tokens between them"},
            {"context", l.context, "a sequence (ring attention)"},
            {"dense", l.dense, "one sharded copy of the dense weights"},
            {"replicas", l.dense_replicas, "gradients of the same shard"},
            {"expert", l.expert, "the experts of a layer"},
            {"expert_shard", l.expert_shard, "the weights of one expert"},
            {"sequence", l.sequence, "a sequence, in all"}};
  return {{"dense", l.dense, "one sharded copy of the dense weights"},
          {"replicas", l.dense_replicas, "gradients of the same shard"},
          {"sequence", l.sequence, "a sequence (Ulysses)"},
          {"expert", l.expert, "the experts of a layer (Ep)"},
          {"expert_shard", l.expert_shard, "the weights of one expert (F)"},
          {"vocabulary", l.vocabulary, "the vocabulary projection (P)"},
          {"vocabulary_replicas", l.vocabulary_replicas, "gradients of the same vocabulary shard"}};
}

cost::Placement place(const plan::Span& span, const predict::Scenario& s) {
  return cost::place({program::Axis::world, span.size, span.stride}, s.used_per_node(), s.gpus());
}

void print_json(const predict::Scenario& s, const plan::Layout& layout) {
  Json json{{"model", s.model.name},
            {"cluster", s.cluster.name},
            {"gpus", s.gpus()},
            {"plan", Json::parse(plan_json(s.plan))}};
  for (const GroupLine& group : groups(s.plan, layout)) {
    const cost::Placement at = place(group.span, s);
    json["groups"][group.name] = {{"size", group.span.size},
                                  {"stride", group.span.stride},
                                  {"per_node", at.local()},
                                  {"nodes", at.nodes}};
  }
  json["sequence_groups"] = layout.sequence_groups;
  json["tokens_per_step"] = predict::tokens_per_step(s);
  fmt::print("{}\n", json.dump(2));
}

void print_text(const predict::Scenario& s, const plan::Layout& layout) {
  fmt::print("{}plan {}\n\n", headline(s), plan::describe(s.plan));
  TextTable table({"group", "ranks", "stride", "a node", "nodes", "shares"}, "lrrrrl");
  for (const GroupLine& group : groups(s.plan, layout)) {
    const cost::Placement at = place(group.span, s);
    table.add({group.name, std::to_string(group.span.size), std::to_string(group.span.stride),
               fmt::format("{:.4g}", at.local()), std::to_string(at.nodes), group.shares});
  }
  TextTable knobs({"setting", "value", "meaning"}, "lll");
  for (const plan::Knob& knob : plan::knobs())
    if (search::has_knob(s.plan, knob)) knobs.add({knob.name, knob.get(s.plan), knob.help});
  fmt::print("{}\n{}", table.text(), knobs.text());
}

}  // namespace

void add_show_plan(CLI::App& show) {
  CLI::App* command = show.add_subcommand("plan", "degrees, groups and policies of a plan");
  command->footer(
      "A plan is a family with settings: --plan mop --ulysses 8, or --plan mop:ulysses=8. What is auto is "
      "chosen.\n"
      "Example:\n"
      "  mop show plan --model kimi-k2 --nodes 12 --context 1M --plan mop --ulysses 32\n"
      "  mop show plan --model mixtral-8x7b --nodes 2 --plan fsdp2:ep=8,cp=2 --format json");
  const auto flags = std::make_shared<Flags>(*command, Flags::Values::one, std::vector<std::string>{"mop"},
                                             Flags::Knobs::listed);
  command->callback([flags] {
    flags->read_file();
    predict::Scenario s = flags->scenario();
    predict::validate(s);
    s.plan = search::choose(s);
    (flags->json() ? print_json : print_text)(s, plan::layout(s.plan, s.gpus()));
  });
}

}  // namespace mop::cli
