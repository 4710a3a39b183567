#include "exec/calibrate/power_sensor.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <array>
#include <type_traits>

#include "kernels/check.h"

namespace mop::calibrate {

// As nvmlFieldValue_t, whose header comes with no package of the toolkit that we need.
struct PowerSensor::Field {
  unsigned id = 0, scope = 0;
  long long timestamp = 0, latency = 0;
  int type = 0, status = 0;
  union {
    double real;
    unsigned number;
    unsigned long long large;
  } value{};
};

namespace {

constexpr unsigned kPowerNow = 186;  // NVML_FI_DEV_POWER_INSTANT, milliwatts

}  // namespace

std::optional<PowerSensor> PowerSensor::of_this_gpu() {
  int device = 0;
  std::array<char, 32> bus{};
  kernels::check(cudaGetDevice(&device), "the GPU");
  kernels::check(cudaDeviceGetPCIBusId(bus.data(), bus.size(), device), "the GPU");
  void* const library = dlopen("libnvidia-ml.so.1", RTLD_NOW);
  if (library == nullptr) return std::nullopt;
  const auto function = [&](const char* name, auto& to) {
    to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(dlsym(library, name));
    return to != nullptr;
  };
  PowerSensor sensor;
  int (*start)() = nullptr;
  int (*find)(const char*, void**) = nullptr;
  unsigned milliwatts = 0;
  const bool tells = function("nvmlInit_v2", start) && function("nvmlDeviceGetHandleByPciBusId_v2", find) &&
                     function("nvmlDeviceGetFieldValues", sensor.fields_) &&
                     function("nvmlDeviceGetEnforcedPowerLimit", sensor.limit_) && start() == 0 &&
                     find(bus.data(), &sensor.device_) == 0 &&
                     sensor.limit_(sensor.device_, &milliwatts) == 0 && sensor.watts() > 0;
  return tells ? std::optional(sensor) : std::nullopt;
}

double PowerSensor::watts() const {
  Field field;
  field.id = kPowerNow;
  return fields_(device_, 1, &field) == 0 && field.status == 0 ? 1e-3 * field.value.number : 0;
}

double PowerSensor::limit_watts() const {
  unsigned value = 0;
  return limit_(device_, &value) == 0 ? 1e-3 * value : 0;
}

}  // namespace mop::calibrate
