// Stands in for torch_parallel_for where a sanitizer must see the threads: torch's own pool is not instrumented.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

// As many threads as there are pieces of at least `grain` items, at most four, each new: nothing orders their work.
extern "C" __attribute__((visibility("default"))) int32_t test_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                                                             void (*body)(int64_t, int64_t, void*),
                                                                             void* context) {
  const int64_t n = end - begin, pieces = std::min<int64_t>(4, (n + grain - 1) / std::max<int64_t>(1, grain));
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < pieces; ++i) {
    threads.emplace_back([=] { body(begin + n * i / pieces, begin + n * (i + 1) / pieces, context); });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}
