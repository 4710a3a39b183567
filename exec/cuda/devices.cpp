#include "exec/cuda/devices.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <cstdlib>

#include "sim/base/error.h"

namespace mop::cuda {

void ask_for_queues() {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
}

int count_devices(const char* instead) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    cudaGetLastError();
    throw UserError(fmt::format(
        "no GPU is found, or its driver is too old for this CUDA (nvidia-smi tells); {}", instead));
  }
  return devices;
}

void use_device(int device) {
  const cudaError_t status = cudaSetDevice(device);
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw UserError(fmt::format(
      "GPU {} gives no context: {}; another program may be using all of it (nvidia-smi tells): end that, or "
      "choose other GPUs by CUDA_VISIBLE_DEVICES",
      device, cudaGetErrorString(status)));
}

}  // namespace mop::cuda
