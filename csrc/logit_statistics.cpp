// Peak, logarithm of the sum of exponentials, target's value and sum of each row of logits, in one pass over memory.
//
// logits (C, V) with a row stride; target (C,); results (C,). The sum of exponentials follows the largest value so far: what
// was summed before is scaled when a larger one appears.
#include "exponential.h"
#include "row_blocks.h"

namespace memsave {
namespace {

constexpr int64_t kGrainElements = 1 << 14;

struct Statistics {
  const char* logits;
  int64_t dtype, columns, logits_row_bytes;
  const int64_t* target;
  float softcap;  // 0 for none
  float *peak, *log_sum, *at_target, *total;
};

MS_INLINE float largest_of(const float* values, int64_t n, float least) {
  float lanes[16];
  std::fill(lanes, lanes + 16, least);
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) {
    for (int k = 0; k < 16; ++k) lanes[k] = values[j + k] > lanes[k] ? values[j + k] : lanes[k];
  }
  for (; j < n; ++j) lanes[0] = values[j] > lanes[0] ? values[j] : lanes[0];
  return *std::max_element(lanes, lanes + 16);
}

MS_INLINE double sum_of(const float* values, int64_t n) {
  float lanes[32] = {};
  int64_t j = 0;
  for (; j + 32 <= n; j += 32) {
    for (int k = 0; k < 32; ++k) lanes[k] += values[j + k];
  }
  for (int k = 0; j < n; ++j, ++k) lanes[k] += values[j];
  double sum = 0.0;
  for (int k = 0; k < 32; ++k) sum += lanes[k];
  return sum;
}

MS_INLINE void one_row(const Statistics& job, int64_t row) {
  const char* logits = job.logits + row * job.logits_row_bytes;
  const int64_t target = job.target[row];
  float buffer[kBlock], powers[kBlock], largest = -HUGE_VALF, peak = 0.0f, at_target = 0.0f;
  double exp_sum = 0.0, total = 0.0;
  for (int64_t start = 0; start < job.columns; start += kBlock) {
    const int64_t n = std::min(kBlock, job.columns - start);
    const float* z = load(logits, job.dtype, start, n, buffer);
    if (job.softcap > 0.0f) {
      for (int64_t j = 0; j < n; ++j) buffer[j] = job.softcap * tanh_of(z[j] / job.softcap);
      z = buffer;
    }
    largest = largest_of(z, n, largest);
    const float before = peak;
    peak = std::fabs(largest) == HUGE_VALF ? 0.0f : largest;
    if (exp_sum != 0.0 && peak != before) exp_sum *= std::exp(static_cast<double>(before) - peak);
    for (int64_t j = 0; j < n; ++j) powers[j] = exp_of(z[j] - peak);
    exp_sum += sum_of(powers, n);
    total += sum_of(z, n);
    if (start <= target && target < start + n) at_target = z[target - start];
  }
  job.peak[row] = peak;
  job.log_sum[row] = static_cast<float>(std::log(exp_sum));
  job.at_target[row] = at_target;
  job.total[row] = static_cast<float>(total);
}

MS_CLONES void rows(const Statistics& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) one_row(job, row);
}

}  // namespace
}  // namespace memsave

// logits of any type but float64.
MS_EXPORT int64_t ms_logit_statistics(const void* logits, int64_t dtype, int64_t n_rows, int64_t columns,
                                      int64_t row_stride, const int64_t* target, float softcap, float* peak,
                                      float* log_sum, float* at_target, float* total) {
  using namespace memsave;
  const Statistics job{static_cast<const char*>(logits), dtype, columns, row_bytes(dtype, row_stride), target, softcap,
                       peak, log_sum, at_target, total};
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, columns));
  parallel_for(n_rows, grain, [&](int64_t begin, int64_t end) { rows(job, begin, end); });
  return 0;
}
