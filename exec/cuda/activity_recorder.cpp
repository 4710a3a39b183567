#include "exec/cuda/activity_recorder.h"

#include <cuda_runtime_api.h>
#include <cupti.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include <cstdlib>
#include <mutex>
#include <string>
#include <type_traits>
#include <unordered_map>

#include "kernels/fallback.h"

namespace mop::cuda {
namespace {

// External ids come with the records of API calls only.
constexpr CUpti_ActivityKind kKinds[] = {CUPTI_ACTIVITY_KIND_RUNTIME,
                                         CUPTI_ACTIVITY_KIND_DRIVER,
                                         CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL,
                                         CUPTI_ACTIVITY_KIND_MEMCPY,
                                         CUPTI_ACTIVITY_KIND_MEMCPY2,
                                         CUPTI_ACTIVITY_KIND_MEMSET,
                                         CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION};
constexpr CUpti_ExternalCorrelationKind kOwn = CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM0;
constexpr size_t kBuffer = size_t{8} << 20;

struct Timed {
  uint32_t call;
  int64_t start, end;
};

// Filled by CUPTI's thread, too.
struct Records {
  std::mutex mutex;
  std::unordered_map<uint32_t, size_t> launch_of_call;
  std::vector<Timed> timed;
  size_t lost = 0;
};
Records& records() {
  static auto* const all = new Records;  // CUPTI may deliver after the end of main
  return *all;
}

void CUPTIAPI give_buffer(uint8_t** buffer, size_t* bytes, size_t* most_records);
void CUPTIAPI take_buffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t filled);

// mop runs where there is none. Records change with CUDA's major version, so no other will do.
struct Library {
  Library() {
    const std::string name = fmt::format("libcupti.so.{}", CUDART_VERSION / 1000);
    void* const file = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (file == nullptr) {
      missing = dlerror();
      return;
    }
    const auto find = [&](auto& function, const char* symbol) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(file, symbol));
      if (function == nullptr) missing = fmt::format("{} has no {}", name, symbol);
    };
    find(register_callbacks, "cuptiActivityRegisterCallbacks");
    find(enable, "cuptiActivityEnable");
    find(disable, "cuptiActivityDisable");
    find(flush, "cuptiActivityFlushAll");
    find(next, "cuptiActivityGetNextRecord");
    find(push, "cuptiActivityPushExternalCorrelationId");
    find(pop, "cuptiActivityPopExternalCorrelationId");
    find(describe, "cuptiGetResultString");
    find(dropped, "cuptiActivityGetNumDroppedRecords");
    if (missing.empty()) missing = reason(register_callbacks(give_buffer, take_buffer));
  }
  std::string reason(CUptiResult status) const {
    const char* text = "an unknown error";
    if (status == CUPTI_SUCCESS) return {};
    describe(status, &text);
    return text;
  }

  std::string missing;  // empty: nothing
  decltype(&cuptiActivityRegisterCallbacks) register_callbacks = nullptr;
  decltype(&cuptiActivityEnable) enable = nullptr;
  decltype(&cuptiActivityDisable) disable = nullptr;
  decltype(&cuptiActivityFlushAll) flush = nullptr;
  decltype(&cuptiActivityGetNextRecord) next = nullptr;
  decltype(&cuptiActivityPushExternalCorrelationId) push = nullptr;
  decltype(&cuptiActivityPopExternalCorrelationId) pop = nullptr;
  decltype(&cuptiGetResultString) describe = nullptr;
  decltype(&cuptiActivityGetNumDroppedRecords) dropped = nullptr;
};
const Library& cupti() {
  static const auto* const library = new Library;
  return *library;
}

template <class Record>
void add_timed(const CUpti_Activity* activity) {
  const auto& record = *reinterpret_cast<const Record*>(activity);
  if (record.start == 0 || record.end == 0) {  // CUPTI does not know
    ++records().lost;
    return;
  }
  records().timed.push_back(
      {record.correlationId, static_cast<int64_t>(record.start), static_cast<int64_t>(record.end)});
}

void add(const CUpti_Activity* activity) {
  switch (activity->kind) {
    case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL:
      return add_timed<CUpti_ActivityKernel10>(activity);
    case CUPTI_ACTIVITY_KIND_MEMCPY:
      return add_timed<CUpti_ActivityMemcpy6>(activity);
    case CUPTI_ACTIVITY_KIND_MEMCPY2:
      return add_timed<CUpti_ActivityMemcpyPtoP4>(activity);
    case CUPTI_ACTIVITY_KIND_MEMSET:
      return add_timed<CUpti_ActivityMemset4>(activity);
    case CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION: {
      const auto& record = *reinterpret_cast<const CUpti_ActivityExternalCorrelation*>(activity);
      if (record.externalKind == kOwn) records().launch_of_call[record.correlationId] = record.externalId;
      return;
    }
    default:
      return;
  }
}

void CUPTIAPI give_buffer(uint8_t** buffer, size_t* bytes, size_t* most_records) {
  *buffer = static_cast<uint8_t*>(std::malloc(kBuffer));
  *bytes = *buffer == nullptr ? 0 : kBuffer;
  *most_records = 0;  // as many as fit
}

void CUPTIAPI take_buffer(CUcontext context, uint32_t stream, uint8_t* buffer, size_t, size_t filled) {
  const std::lock_guard lock(records().mutex);
  for (CUpti_Activity* activity = nullptr; cupti().next(buffer, filled, &activity) == CUPTI_SUCCESS;)
    add(activity);
  if (size_t some = 0; cupti().dropped(context, stream, &some) == CUPTI_SUCCESS) records().lost += some;
  std::free(buffer);
}

}  // namespace

void ActivityRecorder::start() {
  if (on_) return;
  std::string missing = cupti().missing;
  for (const CUpti_ActivityKind kind : kKinds)
    if (missing.empty()) missing = cupti().reason(cupti().enable(kind));
  on_ = missing.empty();
  if (on_) return clear();
  if (cupti().missing.empty())
    for (const CUpti_ActivityKind kind : kKinds) cupti().disable(kind);
  kernels::fallback(
      ("operations are timed by events, with their waits for room, not by CUPTI: " + missing).c_str());
}

void ActivityRecorder::stop() {
  if (!on_) return;
  cupti().flush(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
  for (const CUpti_ActivityKind kind : kKinds) cupti().disable(kind);
  on_ = false;
}

void ActivityRecorder::begin(size_t launch) {
  cupti().push(kOwn, launch);
}

void ActivityRecorder::end() {
  cupti().pop(kOwn, nullptr);
}

void ActivityRecorder::clear() {
  if (on_) cupti().flush(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
  const std::lock_guard lock(records().mutex);
  records().launch_of_call.clear();
  records().timed.clear();
  records().lost = 0;
}

size_t ActivityRecorder::lost() const {
  const std::lock_guard lock(records().mutex);
  return records().lost;
}

std::vector<Activity> ActivityRecorder::activities() {
  if (on_) cupti().flush(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
  const std::lock_guard lock(records().mutex);
  std::vector<Activity> all;
  for (const Timed& one : records().timed)
    if (const auto launch = records().launch_of_call.find(one.call); launch != records().launch_of_call.end())
      all.push_back({launch->second, one.start, one.end});
  return all;
}

}  // namespace mop::cuda
