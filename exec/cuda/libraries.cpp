#include "exec/cuda/libraries.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <cudnn.h>
#include <dlfcn.h>
#include <fmt/format.h>
#include <nccl.h>

#include <array>

#include "sim/base/error.h"

namespace mop::cuda {
namespace {

using Version = std::array<int, 3>;

std::string text(const Version& v) {
  return fmt::format("{}.{}.{}", v[0], v[1], v[2]);
}

std::string file_of(const void* function) {
  Dl_info info{};
  return dladdr(function, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : "an unknown file";
}

std::string known(const char* name, const Version& found, const Version& built, const void* function) {
  if (found < built)
    throw UserError(fmt::format(
        "{} {} is loaded from {}, and this program was built against {}: put the folder of a newer "
        "one first in LD_LIBRARY_PATH, or build again with this one",
        name, text(found), file_of(function), text(built)));
  return fmt::format("{} {}", name, text(found));
}

}  // namespace

std::string check_libraries() {
  int driver = 0, nccl = 0;
  cudaDriverGetVersion(&driver);
  ncclGetVersion(&nccl);
  const auto cublas = static_cast<int>(cublasLtGetVersion()), cudnn = static_cast<int>(cudnnGetVersion());
  const auto version = [](int v) {
    return Version{v / 10000, v / 100 % 100, v % 100};
  };  // as all three write it
  if (driver == 0) throw UserError("no GPU driver is found; install one, or run without --gpus on the CPU");
  if (driver / 1000 < CUDART_VERSION / 1000)  // minor versions of one major version go together
    throw UserError(fmt::format(
        "the GPU driver supports CUDA {}.{}, and this program was built with {}.{}: update the driver",
        driver / 1000, driver / 10 % 100, CUDART_VERSION / 1000, CUDART_VERSION / 10 % 100));
  return fmt::format(
      "driver {}.{}, {}, {}, {}", driver / 1000, driver / 10 % 100,
      known("cuBLAS", version(cublas), version(CUBLAS_VERSION),
            reinterpret_cast<const void*>(&cublasLtGetVersion)),
      known("cuDNN", version(cudnn), version(CUDNN_VERSION), reinterpret_cast<const void*>(&cudnnGetVersion)),
      known("NCCL", version(nccl), version(NCCL_VERSION_CODE),
            reinterpret_cast<const void*>(&ncclGetVersion)));
}

}  // namespace mop::cuda
