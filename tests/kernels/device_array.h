// Arrays on the device for tests and benchmarks, and the numbers in them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "kernels/check.h"
#include "kernels/type.h"

namespace mop::kernels {

// Why GPU tests cannot run here; empty if they can.
inline std::string no_gpu() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return "no CUDA device";
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "device");
  if (properties.major != 9) return std::string(properties.name) + " is not of compute capability 9.0";
  return "";
}

class DeviceBytes {
 public:
  explicit DeviceBytes(size_t bytes) : bytes_(bytes) {
    check(cudaMalloc(&data_, std::max<size_t>(bytes, 256)), "test memory");
  }
  ~DeviceBytes() { cudaFree(data_); }
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;
  void* get() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  size_t bytes_;
  void* data_ = nullptr;
};

using Values = std::vector<double>;

inline double round_to(Type type, double value) {
  const auto f = static_cast<float>(value);
  return type == Type::bf16 ? __bfloat162float(__float2bfloat16(f)) : f;
}

inline Values random_values(int64_t n, Type type, std::mt19937& random, double deviation = 1) {
  std::normal_distribution<double> normal(0, deviation);
  Values values(static_cast<size_t>(n));
  for (double& v : values) v = round_to(type, normal(random));
  return values;
}

// bf16 or fp32 elements.
class DeviceArray {
 public:
  DeviceArray(const Values& values, Type type)
      : type_(type), n_(values.size()), bytes_(values.size() * size_of(type)) {
    std::vector<std::byte> raw(bytes_.size());
    for (size_t i = 0; i < n_; ++i) {
      const auto f = static_cast<float>(values[i]);
      if (type == Type::bf16) {
        reinterpret_cast<__nv_bfloat16*>(raw.data())[i] = __float2bfloat16(f);
      } else {
        reinterpret_cast<float*>(raw.data())[i] = f;
      }
    }
    check(cudaMemcpy(bytes_.get(), raw.data(), raw.size(), cudaMemcpyHostToDevice), "test data");
  }
  // Elements that nothing wrote show.
  static DeviceArray poisoned(int64_t n, Type type) {
    return {Values(static_cast<size_t>(n), kPoison), type};
  }
  static constexpr double kPoison = -7936;  // exact in bf16

  void* get(int64_t element = 0) const {
    return static_cast<std::byte*>(bytes_.get()) + element * static_cast<int64_t>(size_of(type_));
  }
  Values values() const {
    std::vector<std::byte> raw(bytes_.size());
    check(cudaDeviceSynchronize(), "test");
    check(cudaMemcpy(raw.data(), bytes_.get(), raw.size(), cudaMemcpyDeviceToHost), "test data");
    Values out(n_);
    for (size_t i = 0; i < n_; ++i)
      out[i] = type_ == Type::bf16 ? __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(raw.data())[i])
                                   : reinterpret_cast<const float*>(raw.data())[i];
    return out;
  }

 private:
  Type type_;
  size_t n_;
  DeviceBytes bytes_;
};

// |actual - expected| / |expected| in the Frobenius norm; NaN where either has one.
inline double relative_error(const Values& actual, const Values& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference) / std::sqrt(norm + 1e-300);
}

// Of sums in fp32 whose result is rounded to the type: half a unit of bf16's last of 8 bits is 2^-9, its mean
// square over all mantissas about 1.7e-3.
inline double bound(Type type) {
  return type == Type::bf16 ? 2.5e-3 : 2e-5;
}

}  // namespace mop::kernels
