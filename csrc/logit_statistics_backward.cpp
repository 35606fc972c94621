// Logits become their own gradient, in one pass over memory.
//
// logits (C, V) with a row stride; everything else (C,). z = logits, or softcap * tanh(logits / softcap); the gradient is
// d_lse * e^(z - peak - log_sum) + d_total, plus d_target at the target, times the derivative of the softcap.
#include "exponential.h"
#include "row_blocks.h"

namespace memsave {
namespace {

constexpr int64_t kGrainElements = 1 << 14;

struct Gradient {
  char* logits;
  int64_t dtype, columns, logits_row_bytes;
  const int64_t* target;
  const float *peak, *log_sum, *d_lse, *d_target, *d_total;
  float softcap;  // 0 for none
};

MS_INLINE void one_row(const Gradient& job, int64_t row) {
  char* logits = job.logits + row * job.logits_row_bytes;
  const int64_t target = job.target[row];
  const float peak = job.peak[row], log_sum = job.log_sum[row], d_lse = job.d_lse[row], d_total = job.d_total[row];
  float buffer[kBlock], tanh[kBlock], values[kBlock];
  for (int64_t start = 0; start < job.columns; start += kBlock) {
    const int64_t n = std::min(kBlock, job.columns - start);
    const float* z = load(logits, job.dtype, start, n, buffer);
    if (job.softcap > 0.0f) {
      for (int64_t j = 0; j < n; ++j) tanh[j] = tanh_of(z[j] / job.softcap);
      for (int64_t j = 0; j < n; ++j) buffer[j] = job.softcap * tanh[j];
      z = buffer;
    }
    for (int64_t j = 0; j < n; ++j) values[j] = d_lse * exp_of(z[j] - peak - log_sum) + d_total;
    if (start <= target && target < start + n) values[target - start] += job.d_target[row];
    if (job.softcap > 0.0f) {
      for (int64_t j = 0; j < n; ++j) values[j] *= 1.0f - tanh[j] * tanh[j];
    }
    store(values, logits, job.dtype, start, n);
  }
}

MS_CLONES void rows(const Gradient& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) one_row(job, row);
}

}  // namespace
}  // namespace memsave

// logits of any type but float64.
MS_EXPORT int64_t ms_logit_statistics_backward(void* logits, int64_t dtype, int64_t n_rows, int64_t columns,
                                               int64_t row_stride, const int64_t* target, const float* peak,
                                               const float* log_sum, const float* d_lse, const float* d_target,
                                               const float* d_total, float softcap) {
  using namespace memsave;
  const Gradient job{static_cast<char*>(logits), dtype, columns, row_bytes(dtype, row_stride), target, peak, log_sum,
                     d_lse, d_target, d_total, softcap};
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, columns));
  parallel_for(n_rows, grain, [&](int64_t begin, int64_t end) { rows(job, begin, end); });
  return 0;
}
