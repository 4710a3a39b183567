// The versions of the CUDA libraries that this process really loaded.
#pragma once
#include <string>

namespace mop::cuda {

// "driver 13.0, cuBLAS 13.1.0, cuDNN 9.19.0, NCCL 2.28.9". Errors: UserError for one that is older than what
// this program was built against, with the file that was loaded and what to do.
std::string check_libraries();

}  // namespace mop::cuda
