// What goes wrong with files: told in one line, never a crash.
#include <sys/resource.h>

#include <csignal>
#include <cstring>
#include <random>

#include "exec/weights/safetensors.h"
#include "tests/exec/weights/support.h"

namespace mop::weights::testing {
namespace {

const std::string kModel = "tests/data/hf/mixtral";

// A file of the format: header and data.
std::string file_text(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  std::string text(sizeof length, '\0');
  std::memcpy(text.data(), &length, sizeof length);
  return text + header + data;
}

class Failure : public ::testing::Test {
 protected:
  Failure() : model_(config(kModel)) {}

  // A good checkpoint to spoil.
  void write_good(int64_t max_file_bytes = kShardBytes) {
    write(model_, kModel, RandomSource(model_, 1), folder(), Type::bf16, max_file_bytes);
  }
  fs::path folder() const { return scratch_ / "weights"; }
  fs::path file() const { return folder() / kSingleFile; }
  std::string open_error() const {
    return error_of([&] { const HuggingFaceSource source(model_, folder()); });
  }
  void expect_error(const std::string& part) const {
    const std::string message = open_error();
    EXPECT_NE(message.find(part), std::string::npos) << message;
    EXPECT_NE(message.find(folder().string()), std::string::npos) << message;
  }
  // Changes the header, keeping the data.
  template <typename Edit>
  void edit_header(Edit edit) const {
    const std::string text = text_of(file());
    uint64_t length = 0;
    std::memcpy(&length, text.data(), sizeof length);
    Json header = Json::parse(text.substr(8, length));
    edit(header);
    write_text(file(), file_text(header.dump(), text.substr(8 + length)));
  }

  model::ModelConfig model_;
  Scratch scratch_;
};

TEST_F(Failure, NoFiles) {
  expect_error("neither model.safetensors nor model.safetensors.index.json");
  fs::create_directories(folder());
  expect_error("neither model.safetensors nor model.safetensors.index.json");
}

TEST_F(Failure, TruncatedAnywhere) {
  write_good();
  const std::string text = text_of(file());
  std::mt19937 random(3);
  std::vector<size_t> lengths{0, 1, 7, 8, 9, text.size() - 1};
  for (int i = 0; i < 50; ++i) lengths.push_back(random() % text.size());
  for (const size_t length : lengths) {
    write_text(file(), text.substr(0, length));
    expect_error(length < 8 ? "too short" : "cut off");
  }
  write_text(file(), text + "more");
  expect_error("goes on after its last tensor");
}

TEST_F(Failure, MissingTensor) {
  write_good();
  edit_header([](Json& header) {
    header["renamed"] = header["model.norm.weight"];
    header.erase("model.norm.weight");
  });
  expect_error("model.norm.weight is missing");
}

TEST_F(Failure, UnknownTensor) {
  write_good();
  edit_header([](Json& header) {
    header["model.layers.1.self_attn.q_proj.bias"] = {
        {"dtype", "F32"}, {"shape", {0}}, {"data_offsets", {0, 0}}};
  });
  expect_error("model.layers.1.self_attn.q_proj.bias is of no parameter");
}

TEST_F(Failure, WhatLiesBeyondTheLayersIsLeftAlone) {
  write_good();
  edit_header([](Json& header) {
    for (const char* name : {"model.layers.2.eh_proj.weight", "model.layers.61.enorm.weight",
                             "model.layers.0.self_attn.rotary_emb.inv_freq"})
      header[name] = {{"dtype", "F32"}, {"shape", {0}}, {"data_offsets", {0, 0}}};
  });
  EXPECT_NO_THROW(HuggingFaceSource(model_, folder()));
}

TEST_F(Failure, WrongShape) {
  write_good();
  edit_header([](Json& header) { header["lm_head.weight"]["shape"] = {32, 96}; });
  expect_error("lm_head.weight has shape (32, 96), and config.json makes it (96, 32)");
}

TEST_F(Failure, WrongType) {
  write_good();
  edit_header([](Json& header) { header["lm_head.weight"]["dtype"] = "I16"; });
  expect_error("lm_head.weight is of type I16");
  edit_header([](Json& header) { header["lm_head.weight"]["dtype"] = "Q16"; });
  expect_error("unknown dtype");
}

TEST_F(Failure, QuantisedByConfig) {
  write_good();
  Json json = Json::parse(text_of(folder() / "config.json"));
  json["quantization_config"] = {{"quant_method", "mxfp4"}};
  write_text(folder() / "config.json", json.dump());
  expect_error("quantised (\"mxfp4\"): give a bf16 version");
}

TEST_F(Failure, QuantisedByTensors) {
  const std::string oss = "tests/data/hf/gpt_oss";
  model_ = config(oss);
  write(model_, oss, RandomSource(model_, 1), folder(), Type::bf16);
  edit_header([](Json& header) {
    const std::string name = "model.layers.0.mlp.experts.gate_up_proj";
    header[name + "_blocks"] = header[name];
    header.erase(name);
  });
  expect_error("quantised (mxfp4): give a bf16 version");
}

TEST_F(Failure, QuantisedByScales) {
  write_good();
  edit_header([](Json& header) {
    header["model.layers.0.self_attn.q_proj.weight_scale_inv"] = {
        {"dtype", "F32"}, {"shape", {0}}, {"data_offsets", {0, 0}}};
  });
  expect_error("quantised (tensor model.layers.0.self_attn.q_proj.weight_scale_inv)");
}

TEST_F(Failure, OverlappingTensors) {
  write_good();
  edit_header([](Json& header) {
    header["model.layers.0.self_attn.k_proj.weight"]["data_offsets"] =
        header["model.layers.0.self_attn.v_proj.weight"]["data_offsets"];
  });
  expect_error("overlap or leave gaps");
}

TEST_F(Failure, IndexNamesAMissingShard) {
  write_good(10000);
  fs::remove(folder() / "model-00002-of-00005.safetensors");
  for (const fs::directory_entry& entry : fs::directory_iterator(folder()))
    if (entry.path().filename().string().starts_with("model-00002")) fs::remove(entry.path());
  expect_error("model-00002-of-");
  expect_error("which the folder lacks");
}

TEST_F(Failure, IndexIsWrong) {
  write_good(10000);
  const fs::path index = folder() / kIndexFile;
  const Json good = Json::parse(text_of(index));
  const auto with = [&](const std::string& tensor, const Json& file) {
    Json json = good;
    json["weight_map"][tensor] = file;
    write_text(index, json.dump());
  };
  with("model.norm.weight", "../model-00001.safetensors");
  expect_error("not the name of a file in this folder");
  with("model.norm.weight", "");
  expect_error("not the name of a file in this folder");
  with("model.norm.weight", 3);
  expect_error("has no file name");
  with("model.norm.weight", good["weight_map"]["model.embed_tokens.weight"]);
  expect_error("model.norm.weight is not in model-00001");
  with("model.nothing", good["weight_map"]["model.norm.weight"]);
  expect_error("model.nothing is not in");
  for (const char* text : {"", "{", "[]", "{\"weight_map\": 3}", "null"}) {
    write_text(index, text);
    expect_error("is not an index");
  }
  write_text(index, "{\"weight_map\": {}}");
  expect_error("is missing");
}

TEST_F(Failure, ATensorInTwoShards) {
  write_good(10000);
  const Json index = Json::parse(text_of(folder() / kIndexFile));
  const auto path = [&](const char* tensor) {
    return folder() / index["weight_map"][tensor].get<std::string>();
  };
  fs::copy_file(path("model.embed_tokens.weight"), path("model.norm.weight"),
                fs::copy_options::overwrite_existing);
  expect_error("is in another file too");
}

TEST_F(Failure, Headers) {
  fs::create_directories(folder());
  const std::string huge =
      "{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,0]}}";
  for (const std::string& header :
       {std::string(), std::string("null"), std::string("[1]"), std::string("{\"a\":1}"),
        std::string("{\"a\":{}}"), std::string("{\"a\":{\"dtype\":1,\"shape\":[],\"data_offsets\":[0,4]}}"),
        std::string("{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}"),
        std::string("{\"a\":{\"dtype\":\"F32\",\"shape\":[1.5],\"data_offsets\":[0,4]}}"),
        std::string("{\"a\":{\"dtype\":\"F32\",\"shape\":{},\"data_offsets\":[0,4]}}"),
        std::string("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}"),
        std::string("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,18446744073709551615]}}"),
        std::string("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}"),
        std::string("{\"a\\nb\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}"), huge,
        std::string(100000, '['), "{\"a\":" + std::string(100000, '[') + std::string(100000, ']') + "}"}) {
    write_text(file(), file_text(header, "1234"));
    EXPECT_NE(open_error(), "") << header;
  }
  std::string text = file_text("{}", "");
  std::memset(text.data(), 0xff, 8);
  write_text(file(), text);
  expect_error("over 100 MB");
}

// Random damage to bytes and to the JSON: an error in one line, or tensors that can be read to their end.
TEST_F(Failure, RandomCorruption) {
  std::mt19937 random(5);
  const std::string header =
      "{\"__metadata__\":{\"format\":\"pt\"},\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]"
      "},"
      "\"b\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[24,32]},"
      "\"c\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[32,33]}}";
  const std::string good = file_text(header, std::string(33, 'x'));
  const std::vector<std::string> words{"-1",
                                       "0",
                                       "18446744073709551616",
                                       "9223372036854775807",
                                       "1e9",
                                       "null",
                                       "[]",
                                       "{}",
                                       "\"F64\"",
                                       "\"\"",
                                       "[",
                                       "}",
                                       ",",
                                       "\\u0000",
                                       "25"};
  const auto pick = [&](size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random); };
  int opened = 0;
  for (int i = 0; i < 5000; ++i) {
    std::string text = good;
    if (i % 2 == 0) {
      for (size_t n = 1 + pick(3); n > 0; --n) text[pick(text.size())] = static_cast<char>(pick(256));
    } else {
      std::string edited = header;
      const size_t at = pick(edited.size());
      edited.replace(at, pick(4), words[pick(words.size())]);
      text = file_text(edited, std::string(33, 'x'));
    }
    if (i % 5 == 0) text.resize(pick(text.size() + 1));
    write_text(scratch_ / "x", text);
    try {
      const TensorFile tensors(scratch_ / "x");
      ++opened;
      int sum = 0;
      for (const auto& [name, tensor] : tensors.tensors())
        for (int64_t byte = 0; byte < tensor.bytes; ++byte) sum += static_cast<int>(tensor.data[byte]);
      EXPECT_LE(sum, 33 * 255);
    } catch (const UserError& error) {
      EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    }
  }
  EXPECT_GT(opened, 100);
  EXPECT_LT(opened, 3000);
}

// Runs `call` while no file can grow beyond `bytes`.
template <typename Call>
void with_file_limit(rlim_t bytes, Call call) {
  struct rlimit old {};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const struct rlimit low { bytes, old.rlim_max };
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &low), 0);
  call();
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old), 0);
  std::signal(SIGXFSZ, handler);
}

TEST_F(Failure, AFullDiskLeavesNothingBehind) {
  for (const rlim_t bytes : {rlim_t{10}, rlim_t{5000}, rlim_t{40000}}) {
    with_file_limit(bytes, [&] {
      const std::string message = error_of([&] { write_good(); });
      EXPECT_NE(message.find("cannot write"), std::string::npos) << message;
      EXPECT_NE(message.find("File too large"), std::string::npos) << message;
    });
    EXPECT_TRUE(fs::is_empty(scratch_.path()));
  }
  write_good();
  EXPECT_NO_THROW(HuggingFaceSource(model_, folder()));
}

TEST_F(Failure, AnExportThatFailsLeavesNothingBehind) {
  int calls = 0;
  EXPECT_THROW(write_hugging_face(model_, config_path(kModel), folder(), Type::f32,
                                  [&](model::ParameterId, float*) {
                                    if (++calls == 9) throw UserError("no more");
                                  }),
               UserError);
  EXPECT_TRUE(fs::is_empty(scratch_.path()));
}

TEST_F(Failure, AnExportReplacesNothing) {
  write_good();
  const std::string before = text_of(file());
  EXPECT_NE(error_of([&] { write_good(); }).find("exists already"), std::string::npos);
  EXPECT_EQ(text_of(file()), before);
  fs::create_directories(scratch_ / "empty");
  EXPECT_NO_THROW(
      write(model_, kModel, RandomSource(model_, 1), (scratch_ / "empty").string() + "/", Type::f32));
  EXPECT_NO_THROW(write(model_, kModel, RandomSource(model_, 1), scratch_ / "deep/er", Type::f32));
  EXPECT_NO_THROW(HuggingFaceSource(model_, scratch_ / "empty"));
  EXPECT_NO_THROW(HuggingFaceSource(model_, scratch_ / "deep/er"));
}

TEST_F(Failure, AnUnreadableConfigIsNotExported) {
  const auto nothing = [](model::ParameterId, float*) {};
  EXPECT_NE(error_of([&] {
              write_hugging_face(model_, scratch_ / "no.json", folder(), Type::f32, nothing);
            }).find("no.json"),
            std::string::npos);
  EXPECT_TRUE(fs::is_empty(scratch_.path()));
}

TEST_F(Failure, FamiliesThatCannotHoldTheModel) {
  Json json = Json::parse(text_of(config_path("tests/data/hf/qwen3_moe")));
  json["n_shared_experts"] = 1;
  const model::ModelConfig model = model::parse_config(json.dump(), "mine");
  const std::string message = error_of([&] {
    write_hugging_face(model, config_path("tests/data/hf/qwen3_moe"), folder(), Type::f32,
                       [](model::ParameterId, float*) {});
  });
  EXPECT_NE(message.find("no shared experts"), std::string::npos) << message;
}

}  // namespace
}  // namespace mop::weights::testing
