// What the GPU draws, as the driver's management library tells, which not every host has.
#pragma once
#include <optional>

namespace mop::calibrate {

class PowerSensor {
 public:
  // Of the current GPU; nothing where the library is missing or does not tell.
  static std::optional<PowerSensor> of_this_gpu();

  double watts() const;  // of the last tenth of a second or so; its means and its joules lag by a second
  double limit_watts() const;

 private:
  struct Field;
  void* device_ = nullptr;
  int (*fields_)(void*, int, Field*) = nullptr;
  int (*limit_)(void*, unsigned*) = nullptr;  // milliwatts
};

}  // namespace mop::calibrate
