// Where a config may come from, and the one line that says why it does not.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "tests/model/support.h"

namespace mop::model {
namespace {

namespace fs = std::filesystem;
using testing::shipped_text;

class ReadConfig : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("mop_read_config_" + std::to_string(getpid()));
    fs::create_directories(folder_);
  }
  void TearDown() override {
    std::error_code ignored;
    fs::remove_all(folder_, ignored);
  }
  std::string write(const std::string& name, const std::string& text) {
    const fs::path path = folder_ / name;
    fs::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << text;
    return path.string();
  }
  static void expect_in(const std::string& message, const std::string& part) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  }
  fs::path folder_;
};

TEST_F(ReadConfig, ShortNamePathAndFolderAgree) {
  const std::string file = write("kimi-k2/config.json", shipped_text("kimi-k2"));
  for (const std::string& where :
       {std::string("kimi-k2"), file, (folder_ / "kimi-k2").string(), (folder_ / "kimi-k2").string() + "/"}) {
    const ModelConfig c = read_config(where);
    EXPECT_EQ(c.name, "kimi-k2") << where;
    EXPECT_EQ(c.experts, 384) << where;
  }
}

TEST_F(ReadConfig, OtherFileNameNamesTheModel) {
  EXPECT_EQ(read_config(write("my-model.json", shipped_text("tiny-mixtral"))).name, "my-model");
}

TEST_F(ReadConfig, UnknownShortNameSuggestsTheNearest) {
  const std::string message = error_of([] { read_config("mixtral-8x7"); });
  expect_in(message, "unknown model 'mixtral-8x7'");
  expect_in(message, "did you mean 'mixtral-8x7b'");
  expect_in(message, "kimi-k2");
  expect_in(error_of([] { read_config("Kimi-K2"); }), "did you mean 'kimi-k2'");
}

TEST_F(ReadConfig, MissingFileAndFolder) {
  const std::string missing = (folder_ / "nowhere").string();
  expect_in(error_of([&] { read_config(missing); }), missing + ": no such file or folder");
  expect_in(error_of([] { read_config("nowhere.json"); }), "nowhere.json: no such file or folder");
  expect_in(error_of([] { read_config(std::string(100000, 'x') + "/y"); }), "no such file");
  expect_in(error_of([] { read_config(""); }), "no model given");
}

TEST_F(ReadConfig, FolderWithoutConfig) {
  expect_in(error_of([&] { read_config(folder_.string()); }), "holds no config.json");
}

TEST_F(ReadConfig, UnreadableFile) {
  const std::string file = write("config.json", shipped_text("tiny-mixtral"));
  fs::permissions(file, fs::perms::none);
  if (std::ifstream(file).good()) GTEST_SKIP() << "this user reads files whatever their permissions";
  expect_in(error_of([&] { read_config(file); }), "cannot be read");
}

TEST_F(ReadConfig, FolderNamedConfigJson) {
  fs::create_directories(folder_ / "odd" / "config.json");
  expect_in(error_of([&] { read_config((folder_ / "odd").string()); }), "cannot be read");
}

TEST_F(ReadConfig, NotJson) {
  expect_in(error_of([&] { read_config(write("a/config.json", "")); }), "a/config.json: not JSON");
  expect_in(error_of([&] { read_config(write("b/config.json", "{\n  \"hidden_size\": oops}")); }),
            "not JSON (line 2, column");
  expect_in(error_of([&] { read_config(write("c/config.json", "[1, 2]")); }), "not a JSON object");
  expect_in(error_of([&] { read_config(write("d/config.json", std::string("\xff\xfe\0", 3))); }), "not JSON");
}

TEST_F(ReadConfig, EndlessFileIsRefused) {
  if (!fs::exists("/dev/zero")) GTEST_SKIP() << "no /dev/zero here";
  expect_in(error_of([] { read_config("/dev/zero"); }), "longer than 1 MiB");
}

TEST_F(ReadConfig, ErrorsNameTheFile) {
  const std::string file = write("config.json", "{\"model_type\": \"mixtral\"}");
  expect_in(error_of([&] { read_config(file); }), file + ": field 'num_hidden_layers' is missing");
}

TEST_F(ReadConfig, NoShippedModels) {
  const char* old = std::getenv("MOP_HOME");
  const std::string saved = old != nullptr ? old : "";
  setenv("MOP_HOME", folder_.c_str(), 1);
  const std::string message = error_of([] { read_config("kimi-k2"); });
  EXPECT_TRUE(shipped_models().empty());
  old != nullptr ? setenv("MOP_HOME", saved.c_str(), 1) : unsetenv("MOP_HOME");
  expect_in(message, "set MOP_HOME");
}

}  // namespace
}  // namespace mop::model
