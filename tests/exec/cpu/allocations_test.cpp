#include "tests/exec/support/allocations.h"

#include <gtest/gtest.h>

#include <memory>
#include <new>
#include <vector>

#include "tests/exec/cpu/support.h"

namespace mop::cpu {
namespace {

// The counter itself, or every test that expects none would pass.
TEST(Allocations, AreCounted) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the sanitizer has its own malloc";
#endif
  const int64_t before = test::allocations_of_thread();
  std::vector<int> some(static_cast<size_t>(uniform(10, 20)));
  EXPECT_EQ(test::allocations_of_thread(), before + 1);
  void* volatile aligned = std::aligned_alloc(64, 128);  // volatile: or the compiler leaves it out
  EXPECT_EQ(test::allocations_of_thread(), before + 2);
  std::free(aligned);
  EXPECT_EQ(some.front(), 0);
}

// A product of many tiles, of types that have to be converted and of one that does not: run_op expects no
// allocation of any kernel, here the sizes are those where Eigen would.
TEST(Allocations, LargeProductsMakeNone) {
  for (const Type type : {Type::f32, Type::bf16}) {
    Tensor a = Tensor::random(700, 1100, type), b = Tensor::random(1100, 600, type), c(700, 600, Type::f32);
    run_op(OpKind::gemm, {}, {&a, &b}, {&c});
    EXPECT_EQ(allocations_of_last_run(), 0);
  }
}

}  // namespace
}  // namespace mop::cpu
