// A resolved mop plan as text, for tests of several folders.
#pragma once
#include <string>

namespace mop {

// The four degrees, `more` settings, and for what those leave open: everything in HBM, expanded keys and
// values.
inline std::string mop_plan(int64_t ep, int64_t dense, int64_t ulysses, int64_t vp,
                            const std::string& more = "") {
  std::string text = "mop:ep=" + std::to_string(ep) + ",dense-shard=" + std::to_string(dense) +
                     ",ulysses=" + std::to_string(ulysses) + ",vp=" + std::to_string(vp);
  for (const std::string setting :
       {"vp-scheme=tokens", "mla-exchange=expanded", "checkpoints=hbm", "optimizer=hbm"})
    if (("," + more).find("," + setting.substr(0, setting.find('=') + 1)) == std::string::npos)
      text += "," + setting;
  return more.empty() ? text : text + "," + more;
}

}  // namespace mop
