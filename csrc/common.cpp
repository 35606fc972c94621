// What the Python side asks the library for besides its kernels.
#include "common.h"

namespace memsave {
ParallelFor g_parallel_for = nullptr;
}

MS_EXPORT int64_t ms_abi_version() { return memsave::kAbiVersion; }

MS_EXPORT void ms_set_parallel_for(void* parallel_for) {
  memsave::g_parallel_for = reinterpret_cast<memsave::ParallelFor>(parallel_for);
}

// For the known-answer test: words[0..3] is the counter, words[4..5] the key; the result replaces the counter.
MS_EXPORT int64_t ms_philox(uint32_t* words) {
  const memsave::Words out = memsave::philox({words[0], words[1], words[2], words[3]}, words[4], words[5]);
  std::memcpy(words, &out, sizeof(out));
  return 0;
}
