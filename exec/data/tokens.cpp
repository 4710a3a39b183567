#include "exec/data/tokens.h"

#include <filesystem>
#include <system_error>

namespace mop::data {

std::unique_ptr<Tokens> open_tokens(const std::string& path) {
  for (const char* extension : {".bin", ".idx"})
    if (path.ends_with(extension)) return open_megatron(path.substr(0, path.size() - 4));
  std::error_code none;  // what cannot be looked at, open_text complains about
  if (!std::filesystem::exists(path, none) && std::filesystem::exists(path + ".idx", none))
    return open_megatron(path);
  return open_text(path);
}

}  // namespace mop::data
