#include "exec/cuda/activity.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>

namespace mop::cuda {

void refine(std::span<program::OpSpan> spans, std::vector<Activity> activities) {
  std::erase_if(activities, [&](const Activity& a) { return a.launch >= spans.size(); });
  if (activities.empty()) return;
  int64_t least = std::numeric_limits<int64_t>::min(), most = std::numeric_limits<int64_t>::max();
  for (const Activity& a : activities) {
    least = std::max(least, a.end - spans[a.launch].end);
    most = std::min(most, a.start - spans[a.launch].start);
  }
  const int64_t offset = std::midpoint(least, most);
  std::ranges::sort(activities, {}, [](const Activity& a) { return std::tuple(a.launch, a.start); });
  for (auto first = activities.begin(); first != activities.end();) {
    program::OpSpan& span = spans[first->launch];
    int64_t end = first->start, busy = 0;
    auto a = first;
    for (; a != activities.end() && a->launch == first->launch; ++a) {
      busy += std::max<int64_t>(0, a->end - std::max(end, a->start));
      end = std::max(end, a->end);
    }
    span.start = first->start - offset;
    span.end = end - offset;
    span.busy = busy;
    first = a;
  }
}

}  // namespace mop::cuda
