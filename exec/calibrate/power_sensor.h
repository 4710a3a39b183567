// What the GPU draws, as the driver's management library tells, which not every host has.
#pragma once
#include <optional>

namespace mop::calibrate {

class PowerSensor {
 public:
  // Of the current GPU; nothing where the library is missing or does not tell.
  static std::optional<PowerSensor> of_this_gpu();

  double joules() const;  // since some time long ago
  double limit_watts() const;

 private:
  void* device_ = nullptr;
  int (*energy_)(void*, unsigned long long*) = nullptr;  // millijoules
  int (*limit_)(void*, unsigned*) = nullptr;             // milliwatts
};

}  // namespace mop::calibrate
