// Fields: a JSON object read field by field, where every error names the file and the field. Private to
// sim/model.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace mop::model {

// The spellings of one field; a JSON null counts as absent, as in transformers. Two spellings that are both
// present must agree. The first is the one that errors ask for.
using Names = std::initializer_list<const char*>;

class Fields {
 public:
  // Errors: UserError for text that is not JSON, not an object, over 1 MiB or nested over 64 deep.
  Fields(const std::string& json_text, std::string source);

  bool has(Names names) const;
  bool is_null(const char* name) const;  // written out as null

  // Each throws UserError when the field is absent and there is no fallback, has another type, or is out of
  // range.
  int64_t count(Names names, int64_t low, int64_t high, std::optional<int64_t> fallback = {}) const;
  double number(Names names, double low, double high, std::optional<double> fallback = {}) const;
  bool flag(Names names, std::optional<bool> fallback = {}) const;
  std::string word(Names names, std::optional<std::string> fallback = {}) const;   // a name, no free text
  std::vector<int64_t> counts(const char* name, int64_t low, int64_t high) const;  // absent: empty
  std::vector<std::string> words(const char* name) const;                          // absent: empty
  Fields object(const char* name) const;                                           // absent: an empty object

  // "<source>: field '<name>' <problem>" as a UserError.
  [[noreturn]] void fail(const std::string& name, const std::string& problem) const;

 private:
  struct Json;  // keeps the JSON library out of headers
  Fields(std::shared_ptr<const Json> json, std::string source, std::string prefix);

  std::shared_ptr<const Json> json_;
  std::string source_;
  std::string prefix_;  // of a nested object, "rope_scaling."
};

}  // namespace mop::model
