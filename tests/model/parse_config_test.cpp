// Field spellings, defaults and every error of parse_config.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "sim/model/counts.h"
#include "tests/model/support.h"

namespace mop::model {
namespace {

using testing::Json;
using testing::parse;
using testing::shipped_json;

Json renamed(Json json, const char* from, const char* to) {
  json[to] = json.at(from);
  json.erase(from);
  return json;
}

Json without(Json json, const char* name) {
  json.erase(name);
  return json;
}

Json with(Json json, const char* name, const Json& value) {
  json[name] = value;
  return json;
}

int64_t total(const ModelConfig& c) {
  return count_parameters(c).total;
}

TEST(Aliases, Experts) {
  const Json qwen = shipped_json("tiny-qwen3-moe");
  for (const char* name : {"num_local_experts", "n_routed_experts"})
    EXPECT_EQ(parse(renamed(qwen, "num_experts", name)).experts, 8) << name;
  const Json v3 = shipped_json("tiny-deepseek-v3");
  EXPECT_EQ(parse(renamed(v3, "n_routed_experts", "num_experts")).experts, 8);
  EXPECT_EQ(parse(renamed(qwen, "num_experts_per_tok", "experts_per_token")).top_k, 2);
}

TEST(Aliases, BothSpellingsMustAgree) {
  const Json json = shipped_json("tiny-gpt-oss");  // holds num_experts_per_tok and experts_per_token, both 2
  EXPECT_EQ(parse(json).top_k, 2);
  const std::string message = error_of([&] { parse(with(json, "experts_per_token", 3)); });
  EXPECT_NE(message.find("'experts_per_token'"), std::string::npos) << message;
  EXPECT_NE(message.find("'num_experts_per_tok'"), std::string::npos) << message;
}

TEST(Aliases, SharedExpertWidth) {
  const Json v3 = shipped_json("tiny-deepseek-v3");
  const ModelConfig c = parse(with(without(v3, "n_shared_experts"), "shared_expert_intermediate_size", 96));
  EXPECT_EQ(c.shared_experts, 1);
  EXPECT_EQ(c.shared_intermediate, 96);
  EXPECT_EQ(
      parse(with(shipped_json("tiny-qwen3-moe"), "shared_expert_intermediate_size", 48)).shared_intermediate,
      48);
  EXPECT_EQ(parse(with(v3, "n_shared_experts", nullptr)).shared_intermediate, 0);
  EXPECT_EQ(parse(with(v3, "n_shared_experts", 3)).shared_intermediate, 96);
}

TEST(Aliases, RopeParametersOfTransformers5) {
  Json json = shipped_json("tiny-deepseek-v3");
  const ModelConfig old_form = parse(json);
  Json rope = json.at("rope_scaling");
  rope["rope_theta"] = json.at("rope_theta");
  json = with(without(without(json, "rope_scaling"), "rope_theta"), "rope_parameters", rope);
  const ModelConfig new_form = parse(json);
  EXPECT_DOUBLE_EQ(new_form.rope_theta, old_form.rope_theta);
  EXPECT_DOUBLE_EQ(new_form.rope.factor, old_form.rope.factor);
  EXPECT_EQ(new_form.rope.original_positions, old_form.rope.original_positions);

  const ModelConfig plain =
      parse(with(shipped_json("tiny-gpt-oss"), "rope_parameters", {{"rope_type", "default"}}));
  EXPECT_DOUBLE_EQ(plain.rope.factor, 1);
  Json glm = without(shipped_json("tiny-glm4-moe"), "partial_rotary_factor");
  glm["rope_parameters"] = {{"partial_rotary_factor", 0.25}};
  EXPECT_DOUBLE_EQ(parse(glm).rotary_fraction, 0.25);
}

TEST(Aliases, DenseLayers) {
  Json json = shipped_json("tiny-qwen3-moe");
  json["decoder_sparse_step"] = 2;
  EXPECT_EQ(parse(json).moe, (std::vector<bool>{false, true, false, true}));
  json["mlp_only_layers"] = {3};
  EXPECT_EQ(parse(json).moe, (std::vector<bool>{false, true, false, false}));
  EXPECT_EQ(parse(json).dense_intermediate, 128);
  Json v3 = shipped_json("tiny-deepseek-v3");
  v3["first_k_dense_replace"] = 2;
  EXPECT_EQ(parse(v3).moe, (std::vector<bool>{false, false, true, true}));
  v3["moe_layer_freq"] = 3;
  EXPECT_EQ(parse(v3).moe, (std::vector<bool>{false, false, false, true}));
}

TEST(Aliases, Windows) {
  Json json = shipped_json("tiny-qwen3-moe");
  json["use_sliding_window"] = true;
  json["sliding_window"] = 64;
  EXPECT_EQ(parse(json).window, std::vector<int64_t>(4, 64));
  json["layer_types"] = {"full_attention", "sliding_attention", "full_attention", "full_attention"};
  EXPECT_EQ(parse(json).window, (std::vector<int64_t>{0, 64, 0, 0}));
  EXPECT_EQ(parse(with(shipped_json("tiny-mixtral"), "sliding_window", 100)).window,
            std::vector<int64_t>(4, 100));
}

TEST(Defaults, OfTheConfigurationClasses) {
  const auto bare = [](const char* name, std::initializer_list<const char*> dropped) {
    Json json = shipped_json(name);
    for (const char* field : dropped) EXPECT_EQ(json.erase(field), 1u) << name << " " << field;
    return parse(json);
  };
  const ModelConfig oss = bare("tiny-gpt-oss", {"attention_bias", "layer_types", "sliding_window",
                                                "rope_scaling", "rope_theta", "rms_norm_eps", "swiglu_limit",
                                                "router_aux_loss_coef", "tie_word_embeddings", "hidden_act"});
  EXPECT_EQ(oss.window, (std::vector<int64_t>{128, 0, 128, 0}));
  EXPECT_TRUE(oss.qkv_bias && oss.out_bias);
  EXPECT_DOUBLE_EQ(oss.rope.factor, 32);
  EXPECT_EQ(oss.rope.original_positions, 4096);
  EXPECT_FALSE(oss.rope.truncate);
  EXPECT_DOUBLE_EQ(oss.rope_theta, 150000);
  EXPECT_DOUBLE_EQ(oss.norm_eps, 1e-5);
  EXPECT_DOUBLE_EQ(oss.swiglu_limit, 7);
  EXPECT_DOUBLE_EQ(oss.aux_loss_coefficient, 0.001);

  const ModelConfig qwen =
      bare("tiny-qwen3-moe", {"attention_bias", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers",
                              "rope_theta", "rms_norm_eps", "head_dim"});
  EXPECT_FALSE(qwen.qkv_bias || qwen.normalise_topk);
  EXPECT_EQ(qwen.moe_layers(), 4);
  EXPECT_EQ(qwen.head_dim, 16);
  EXPECT_DOUBLE_EQ(qwen.rope_theta, 10000);
  EXPECT_DOUBLE_EQ(qwen.norm_eps, 1e-6);

  EXPECT_DOUBLE_EQ(bare("tiny-mixtral", {"rope_theta"}).rope_theta, 1e6);
  EXPECT_DOUBLE_EQ(bare("tiny-olmoe", {"router_aux_loss_coef", "rms_norm_eps"}).norm_eps, 1e-5);

  const ModelConfig v3 =
      bare("tiny-deepseek-v3", {"num_key_value_heads", "norm_topk_prob", "routed_scaling_factor",
                                "scoring_func", "topk_method", "attention_bias", "rope_scaling"});
  EXPECT_EQ(v3.kv_heads, 4);
  EXPECT_TRUE(v3.normalise_topk);
  EXPECT_DOUBLE_EQ(v3.routed_scale, 2.5);
  EXPECT_DOUBLE_EQ(v3.rope.factor, 1);
  EXPECT_DOUBLE_EQ(v3.aux_loss_coefficient, 0);

  const ModelConfig glm = bare("tiny-glm4-moe", {"partial_rotary_factor", "attention_bias", "n_group",
                                                 "topk_group", "routed_scaling_factor", "use_qk_norm"});
  EXPECT_DOUBLE_EQ(glm.rotary_fraction, 0.5);
  EXPECT_FALSE(glm.qkv_bias);
  EXPECT_EQ(glm.router_groups, 1);
  EXPECT_DOUBLE_EQ(glm.routed_scale, 1);
}

TEST(Defaults, BiasesAndNormsThatConfigsMayTurnOn) {
  Json v3 = shipped_json("tiny-deepseek-v3");
  const int64_t plain = total(parse(v3));
  v3["attention_bias"] = true;  // q_a 32, kv_a 16 + 8, out 64, on each of 4 layers
  EXPECT_EQ(total(parse(v3)) - plain, 4 * (32 + 16 + 8 + 64));
  Json glm = shipped_json("tiny-glm4-moe");
  const int64_t before = total(parse(glm));
  glm["use_qk_norm"] = true;
  EXPECT_EQ(total(parse(glm)) - before, 4 * 2 * 16);
}

TEST(Defaults, GroupLimitedDeepSeekV2) {
  Json json = shipped_json("deepseek-v2-lite");
  EXPECT_EQ(parse(json).router_groups, 1);
  json["topk_method"] = "group_limited_greedy";
  json["n_group"] = 8;
  json["topk_group"] = 3;
  EXPECT_EQ(parse(json).router_groups, 8);
  EXPECT_EQ(parse(json).router_top_groups, 3);
  const std::string message = error_of([&] { parse(without(json, "topk_group")); });
  EXPECT_NE(message.find("'topk_group'"), std::string::npos) << message;
}

TEST(Errors, MissingSizesAreNamed) {
  struct Family {
    const char* model;
    std::vector<const char*> required;
  };
  const std::vector<const char*> common = {
      "num_hidden_layers",       "hidden_size",         "vocab_size", "num_attention_heads",
      "max_position_embeddings", "num_experts_per_tok", "model_type"};
  const Family families[] = {
      {"qwen3-30b-a3b", {"num_experts", "num_key_value_heads", "moe_intermediate_size"}},
      {"gpt-oss-20b", {"num_key_value_heads", "head_dim", "intermediate_size"}},
      {"mixtral-8x7b", {"num_key_value_heads", "intermediate_size"}},
      {"olmoe-1b-7b", {"num_experts", "num_key_value_heads", "intermediate_size"}},
      {"deepseek-v3",
       {"q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
        "n_shared_experts", "moe_intermediate_size", "intermediate_size", "first_k_dense_replace"}},
      {"kimi-k2", {"kv_lora_rank", "first_k_dense_replace"}},
      {"deepseek-v2-lite", {"kv_lora_rank", "first_k_dense_replace", "n_shared_experts"}},
      {"glm-4.5-air",
       {"num_key_value_heads", "moe_intermediate_size", "intermediate_size", "first_k_dense_replace"}},
  };
  for (const Family& family : families) {
    std::vector<const char*> required = common;
    required.insert(required.end(), family.required.begin(), family.required.end());
    for (const char* field : required) {
      SCOPED_TRACE(std::string(family.model) + " " + field);
      Json json = without(shipped_json(family.model), field);
      if (std::string(field) == "num_experts_per_tok") json.erase("experts_per_token");
      const std::string message = error_of([&] { parse(json); });
      EXPECT_NE(message.find("test: field '" + std::string(field) + "' is missing"), std::string::npos)
          << message;
    }
  }
  for (const auto& [model, spelling] :
       {std::pair{"mixtral-8x7b", "num_local_experts"}, {"deepseek-v3", "n_routed_experts"}}) {
    const std::string message =
        error_of([&, m = model, s = spelling] { parse(without(shipped_json(m), s)); });
    EXPECT_NE(message.find("'num_experts' is missing"), std::string::npos) << message;
    EXPECT_NE(message.find(spelling), std::string::npos) << message;
  }
}

struct Mistake {
  const char* model;
  const char* field;
  Json value;
  const char* says;  // beside the field's name
};

TEST(Errors, WrongValuesAreNamed) {
  const Mistake mistakes[] = {
      // Types.
      {"tiny-mixtral", "hidden_size", "64", "whole number"},
      {"tiny-mixtral", "hidden_size", 64.5, "whole number"},
      {"tiny-mixtral", "hidden_size", true, "whole number"},
      {"tiny-mixtral", "hidden_size", Json::array(), "whole number"},
      {"tiny-mixtral", "tie_word_embeddings", 1, "true or false"},
      {"tiny-mixtral", "rms_norm_eps", "1e-5", "a number"},
      {"tiny-mixtral", "model_type", 7, "a name in quotes"},
      {"tiny-mixtral", "model_type", "mix\ntral", "a name in quotes"},
      {"tiny-mixtral", "hidden_act", std::string(5000, 'x'), "a name in quotes"},
      {"tiny-deepseek-v3", "rope_scaling", "yarn", "an object or null"},
      {"tiny-gpt-oss", "layer_types", "full_attention", "an array of names"},
      {"tiny-gpt-oss", "layer_types", {1, 2, 3, 4}, "a name in quotes"},
      {"tiny-qwen3-moe", "mlp_only_layers", 3, "an array of whole numbers"},
      {"tiny-qwen3-moe", "mlp_only_layers", {0.5}, "whole number from 0 to 3"},
      // Ranges: zero, negative, absurd, past int64.
      {"tiny-mixtral", "num_hidden_layers", 0, "from 1 to 4096"},
      {"tiny-mixtral", "num_hidden_layers", -4, "from 1 to 4096"},
      {"tiny-mixtral", "num_hidden_layers", 5000, "from 1 to 4096"},
      {"tiny-mixtral", "hidden_size", 1 << 20, "from 1 to 262144"},
      {"tiny-mixtral", "vocab_size", INT64_MAX, "from 1 to"},
      {"tiny-mixtral", "vocab_size", UINT64_MAX, "from 1 to"},
      {"tiny-mixtral", "vocab_size", INT64_MIN, "from 1 to"},
      {"tiny-mixtral", "rms_norm_eps", 0, "from 1e-12 to 1"},
      {"tiny-mixtral", "rms_norm_eps", -1e-5, "from 1e-12 to 1"},
      {"tiny-mixtral", "rope_theta", 0, "from 1 to"},
      {"tiny-mixtral", "rope_theta", 1e300, "from 1 to"},
      {"tiny-mixtral", "router_aux_loss_coef", -1, "from 0 to"},
      {"tiny-mixtral", "sliding_window", 0, "from 1 to"},
      {"tiny-qwen3-moe", "mlp_only_layers", {4}, "from 0 to 3"},
      {"tiny-qwen3-moe", "mlp_only_layers", {UINT64_MAX}, "from 0 to 3"},
      {"tiny-qwen3-moe", "decoder_sparse_step", 0, "from 1 to"},
      {"tiny-deepseek-v3", "first_k_dense_replace", 5, "from 0 to 4"},
      {"tiny-glm4-moe", "partial_rotary_factor", 0, "to 1"},
      {"tiny-glm4-moe", "partial_rotary_factor", 1.5, "to 1"},
      {"tiny-glm4-moe", "n_shared_experts", -1, "from 0 to"},
      // Fields that contradict one another.
      {"tiny-mixtral", "num_experts_per_tok", 9, "only 8 experts"},
      {"tiny-mixtral", "num_key_value_heads", 3, "multiple of num_key_value_heads"},
      {"tiny-mixtral", "num_key_value_heads", 8, "multiple of num_key_value_heads"},
      {"tiny-mixtral", "hidden_size", 66, "head_dim"},
      {"tiny-mixtral", "head_dim", 15, "come in pairs"},
      {"tiny-mixtral", "head_dim", 1, "come in pairs"},
      {"tiny-deepseek-v3", "qk_rope_head_dim", 7, "come in pairs"},
      {"tiny-deepseek-v3", "num_key_value_heads", 2, "num_attention_heads"},
      {"tiny-deepseek-v3", "n_group", 3, "equal groups"},
      {"tiny-deepseek-v3", "n_group", 8, "at least 2"},
      {"tiny-deepseek-v3", "num_experts_per_tok", 5, "topk_group"},
      {"tiny-deepseek-v3", "topk_group", 5, "from 1 to 4"},
      {"tiny-deepseek-v3", "shared_expert_intermediate_size", 0, "n_shared_experts"},
      {"tiny-deepseek-v3", "first_k_dense_replace", 4, "dense model"},
      {"tiny-qwen3-moe", "mlp_only_layers", {0, 1, 2, 3}, "dense model"},
      {"tiny-gpt-oss", "layer_types", {"full_attention"}, "1 entries: num_hidden_layers is 4"},
      {"tiny-gpt-oss",
       "layer_types",
       {"full_attention", "full_attention", "full_attention", "linear"},
       "'linear'"},
      {"tiny-gpt-oss", "sliding_window", nullptr, "is null"},
      {"tiny-gpt-oss", "layer_types", std::vector<std::string>(100000, "x"), "entries"},
      {"tiny-mixtral",
       "layer_types",
       {"full_attention", "sliding_attention", "full_attention", "full_attention"},
       "sliding_window"},
      // What is not modelled is refused by name.
      {"tiny-mixtral", "hidden_act", "gelu", "silu"},
      {"tiny-olmoe", "clip_qkv", 8.0, "not supported"},
      {"tiny-deepseek-v3", "scoring_func", "softmax", "sigmoid"},
      {"tiny-deepseek-v3", "topk_method", "greedy", "noaux_tc"},
      {"deepseek-v2-lite", "mlp_bias", true, "not supported"},
      {"deepseek-v2-lite", "scoring_func", "sigmoid", "softmax"},
  };
  for (const Mistake& mistake : mistakes) {
    SCOPED_TRACE(std::string(mistake.field) + " of " + mistake.model);
    const std::string message =
        error_of([&] { parse(with(shipped_json(mistake.model), mistake.field, mistake.value)); });
    EXPECT_NE(message.find(mistake.field), std::string::npos) << message;
    EXPECT_NE(message.find(mistake.says), std::string::npos) << message;
    EXPECT_EQ(message.rfind("test: ", 0), 0u) << message;
    EXPECT_LT(message.size(), 250u) << message;
  }
}

TEST(Errors, DefaultsThatContradictOtherFields) {
  const Json two_groups = with(without(shipped_json("tiny-deepseek-v3"), "topk_group"), "n_group", 2);
  const std::string message = error_of([&] { parse(two_groups); });
  EXPECT_NE(message.find("'topk_group' is missing: its default 4 is not from 1 to 2"), std::string::npos)
      << message;
}

TEST(Errors, NestedFieldsAreNamedWithTheirPath) {
  const auto message_for = [](const std::function<void(Json&)>& edit) {
    Json json = shipped_json("tiny-deepseek-v3");
    edit(json["rope_scaling"]);
    return error_of([&] { parse(json); });
  };
  const auto expect = [](const std::string& message, const char* part) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  expect(message_for([](Json& rope) { rope.erase("factor"); }), "'rope_scaling.factor' is missing");
  expect(message_for([](Json& rope) { rope.erase("type"); }), "'rope_scaling.rope_type' is missing");
  expect(message_for([](Json& rope) { rope["factor"] = 0.5; }), "'rope_scaling.factor' is 0.5");
  expect(message_for([](Json& rope) { rope["type"] = "llama3"; }), "supported are default and yarn");
  expect(message_for([](Json& rope) { rope["attention_factor"] = 1.2; }), "'rope_scaling.attention_factor'");
  expect(message_for([](Json& rope) { rope["beta_fast"] = "many"; }), "'rope_scaling.beta_fast'");
  Json json = shipped_json("tiny-mixtral");
  json["rope_parameters"] = {{"rope_theta", 5}};
  expect(error_of([&] { parse(json); }), "'rope_theta' disagrees");
}

TEST(Errors, UnknownModelTypeSuggestsTheNearest) {
  const std::string message =
      error_of([] { parse(with(shipped_json("tiny-mixtral"), "model_type", "mixtrall")); });
  EXPECT_NE(message.find("unknown model_type 'mixtrall'; did you mean 'mixtral'?"), std::string::npos)
      << message;
  EXPECT_NE(message.find("glm4_moe"), std::string::npos) << message;
}

TEST(Errors, TotalsStayFarFromOverflow) {
  Json json = shipped_json("mixtral-8x7b");
  json["num_hidden_layers"] = 4096;
  json["hidden_size"] = 1 << 18;
  json["intermediate_size"] = 1 << 20;
  json["num_local_experts"] = 1 << 14;
  const std::string message = error_of([&] { parse(json); });
  EXPECT_NE(message.find("parameters; the limit is 1e+15"), std::string::npos) << message;
}

TEST(Errors, TextThatIsNoConfig) {
  const auto expect = [](const std::string& text, const char* part) {
    const std::string message = error_of([&] { parse_config(text, "test"); });
    EXPECT_NE(message.find(part), std::string::npos) << message;
    EXPECT_EQ(message.rfind("test: ", 0), 0u) << message;
  };
  expect("", "not JSON (line 1, column 1)");
  expect("{", "not JSON");
  expect("{\"hidden_size\": NaN}", "not JSON");
  expect("{\"hidden_size\": Infinity}", "not JSON");
  expect("{\"hidden_size\": 1e999}", "out of range");
  expect("{\"model_type\": \"mixtral\"} trailing", "not JSON");
  expect("null", "not a JSON object");
  expect("3", "not a JSON object");
  expect("\"mixtral\"", "not a JSON object");
  expect(std::string("{\"a\": \"\xc3\x28\"}"), "not JSON");
  expect(std::string("{\"a\": ") + std::string(200000, '['), "nested deeper than 64");
  expect(std::string(200000, '{'), "not JSON");
  std::string deep;
  for (int i = 0; i < 100000; ++i) deep += "{\"a\":";
  expect(deep, "nested deeper than 64");
  expect(std::string(2 << 20, ' '), "longer than 1 MiB");
  expect("{}", "field 'model_type' is missing");
}

TEST(Errors, UnusedFieldsMayHoldAnything) {
  Json json = shipped_json("tiny-mixtral");
  json["quantization_config"] = {{"anything", {1, "two", nullptr}}};
  json["eos_token_id"] = {1, 2, 3};
  json["text"] = std::string("\n\t");
  EXPECT_EQ(total(parse(json)), 477760);
}

}  // namespace
}  // namespace mop::model
