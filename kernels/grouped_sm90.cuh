// CUTLASS's pointer-array grouped product for sm_90a, and what its instances share. Instances are compiled
// one kind a file (grouped_*.cu), as each takes a minute.
#pragma once
#include <cuda_runtime_api.h>
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "kernels/check.h"
#include "kernels/grouped_problem.h"

namespace mop::kernels::sm90 {

using Element = cutlass::bfloat16_t;

// Tiles (m, n, k) of C that one block computes at a time, and the blocks (m, n) that share what they load;
// experts' tiles are rounded up to whole clusters. Cooperative: two warp groups share a tile; pingpong: each
// has its own, and one computes while the other stores. Measured on an H200: which is fastest where.
struct Cooperative {
  using Mainloop = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
};
struct Pingpong {
  using Mainloop = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong;
};
struct ManyRows : Cooperative {
  using Shape = cute::Shape<cute::_128, cute::_256, cute::_64>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
};
struct FewRows : Cooperative {
  using Shape = cute::Shape<cute::_128, cute::_256, cute::_64>;
  using Cluster = cute::Shape<cute::_1, cute::_2, cute::_1>;
};
// Of weight gradients, whose rows are k: C is written, and read where it is added to, which takes as long as
// a short product.
struct LongProducts : Pingpong {
  using Shape = cute::Shape<cute::_128, cute::_128, cute::_64>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
};
using ShortProducts = ManyRows;

enum class Adds { nothing, bias, output };  // to the product; output: where the problem says so

template <class Output, class Tile, Adds adds>
struct Fusion {
  using Operation = cutlass::epilogue::fusion::LinearCombination<Output, float, Output, float>;
};
template <class Output, class Tile>
struct Fusion<Output, Tile, Adds::bias> {
  using Operation = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::plus, Output, float,
                                             cutlass::FloatRoundStyle::round_to_nearest>,
      cutlass::epilogue::fusion::Sm90AccFetch,
      cutlass::epilogue::fusion::Sm90RowBroadcast<0, typename Tile::Shape, Output*, float>>;
};

// transpose_a: A is stored (k, m); transpose_b: B is stored (n, k).
template <class Output, bool transpose_a, bool transpose_b, Adds adds, class Tile>
struct Grouped {
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;
  using LayoutA = std::conditional_t<transpose_a, ColumnMajor, RowMajor>;
  using LayoutB = std::conditional_t<transpose_b, ColumnMajor, RowMajor>;
  using Added = std::conditional_t<adds == Adds::output, Output, void>;
  static constexpr int kAlignment = 128 / cutlass::sizeof_bits<Element>::value;
  static constexpr int kOutputAlignment = 128 / cutlass::sizeof_bits<Output>::value;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename Tile::Shape, typename Tile::Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Added, RowMajor*, kOutputAlignment,
      Output, RowMajor*, kOutputAlignment, typename Tile::Epilogue,
      typename Fusion<Output, Tile, adds>::Operation>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA*, kAlignment, Element, LayoutB*,
      kAlignment, float, typename Tile::Shape, typename Tile::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      typename Tile::Mainloop>::CollectiveOp;
  using Shapes = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shapes, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  // The device arrays are filled by who knows nothing of CUTLASS.
  template <class Stride>
  static Stride* strides(int64_t* values) {
    static_assert(sizeof(Stride) == sizeof(int64_t));
    return reinterpret_cast<Stride*>(values);
  }

  static typename Gemm::Arguments arguments(const GroupedProblem& problem, int clusters) {
    const GroupedArrays& on_device = problem.arrays;
    static_assert(sizeof(typename Shapes::UnderlyingProblemShape) == sizeof(GroupedArrays::Shape));
    typename Gemm::Arguments arguments;
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    arguments.problem_shape = {problem.groups,
                               reinterpret_cast<typename Shapes::UnderlyingProblemShape*>(on_device.shapes),
                               nullptr};
    arguments.mainloop = {reinterpret_cast<const Element**>(on_device.a),
                          strides<typename Kernel::InternalStrideA>(on_device.a_stride),
                          reinterpret_cast<const Element**>(on_device.b),
                          strides<typename Kernel::InternalStrideB>(on_device.b_stride)};
    arguments.epilogue.ptr_D = reinterpret_cast<Output**>(on_device.c);
    arguments.epilogue.dD = strides<typename Kernel::InternalStrideD>(on_device.c_stride);
    if constexpr (adds == Adds::bias) {
      const auto* const bias =
          problem.bias ? reinterpret_cast<const Output* const*>(on_device.bias) : nullptr;
      arguments.epilogue.thread = {{}, {bias}, {}};
    } else if constexpr (adds == Adds::output) {
      arguments.epilogue.thread.alpha = 1;
      arguments.epilogue.thread.beta = problem.adds ? 1 : 0;  // a scalar 0: C is not even read
      arguments.epilogue.ptr_C = const_cast<const Output**>(reinterpret_cast<Output**>(on_device.c));
      arguments.epilogue.dC = strides<typename Kernel::InternalStrideC>(on_device.c_stride);
    } else {
      arguments.epilogue.thread.alpha = 1;
      arguments.epilogue.thread.beta = 0;
    }
    using Order = cutlass::gemm::kernel::detail::RasterOrderOptions;
    arguments.scheduler.raster_order = problem.down_rows ? Order::AlongM : Order::AlongN;
    arguments.hw_info.sm_count = problem.processors;
    arguments.hw_info.max_active_clusters = clusters;
    return arguments;
  }

  static void run(const GroupedProblem& problem, cudaStream_t stream) {
    // Of the device, which does not change: one kind of GPU a process.
    static const int clusters = cutlass::KernelHardwareInfo::query_device_max_active_clusters<Kernel>();
    const auto values = arguments(problem, clusters);
    if (Gemm::get_workspace_size(values) > GroupedProblem::kScratchBytes)
      throw CudaError("grouped matmul: the scratch for its tensor maps is too small");
    Gemm gemm;
    for (const auto status :
         {Gemm::can_implement(values), gemm.initialize(values, problem.scratch, stream), gemm.run(stream)})
      if (status != cutlass::Status::kSuccess)
        throw CudaError(std::string("grouped matmul: ") + cutlassGetStatusString(status));
  }
};

}  // namespace mop::kernels::sm90
