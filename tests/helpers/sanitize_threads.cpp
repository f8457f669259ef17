// Stands for torch's parallel_for in the library that ThreadSanitizer checks: threads that it sees begin and
// end.
#include <algorithm>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "ops.h"

extern "C" __attribute__((visibility("hidden"))) AOTITorchError torch_get_num_threads(uint32_t* count) {
  *count = 4;
  return AOTI_TORCH_SUCCESS;
}

extern "C" __attribute__((visibility("hidden"))) AOTITorchError
torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc work, void* context) {
  const int64_t count = std::min<int64_t>(4, (end - begin + grain - 1) / std::max<int64_t>(1, grain));
  std::vector<std::thread> threads;
  bool failed = false;
  std::mutex mutex;
  for (int64_t i = 0; i < count; ++i)
    threads.emplace_back([&, i] {
      try {
        work(begin + i * (end - begin) / count, begin + (i + 1) * (end - begin) / count, context);
      } catch (const std::exception&) {
        const std::lock_guard<std::mutex> held(mutex);
        failed = true;
      }
    });
  for (std::thread& thread : threads) thread.join();
  return failed ? AOTI_TORCH_FAILURE : AOTI_TORCH_SUCCESS;
}
