// out[r] = x[rows[r]] * scale[r]: gather, conversion to float32, product and rounding in one pass over the kept rows.
//
// x (N, D) with any strides, rows (k,), scale (k,), out (k, D) contiguous. Without a scale torch's index_select is as fast.
#include <algorithm>

#include "common.h"

namespace memsave {
namespace {

constexpr int64_t kGrainElements = 1 << 15;

struct Gather {
  const void* x;
  int64_t row_stride, column_stride, columns;
  const int32_t* rows;
  const float* scale;
  void* out;
};

MS_INLINE void scale_row(const float* source, int64_t stride, int64_t n, float scale, float* target) {
  for (int64_t j = 0; j < n; ++j) target[j] = source[j * stride] * scale;
}

MS_INLINE void scale_row(const double* source, int64_t stride, int64_t n, float scale, double* target) {
  for (int64_t j = 0; j < n; ++j) target[j] = source[j * stride] * static_cast<double>(scale);
}

// By blocks that stay in the nearest cache, so that each loop works on one width and vectorizes fully.
template <class Half>
MS_INLINE void scale_row(const Half* source, int64_t stride, int64_t n, float scale, Half* target) {
  uint32_t block[256];
  for (int64_t start = 0; start < n; start += 256) {
    const int64_t size = std::min<int64_t>(256, n - start);
    for (int64_t j = 0; j < size; ++j) block[j] = source[(start + j) * stride].bits;
    for (int64_t j = 0; j < size; ++j) block[j] = Half::narrow(Half::widen(block[j]) * scale);
    for (int64_t j = 0; j < size; ++j) target[start + j].bits = static_cast<uint16_t>(block[j]);
  }
}

template <class T>
MS_INLINE void gather(const Gather& job, int64_t begin, int64_t end) {
  const int64_t columns = job.columns;
  for (int64_t r = begin; r < end; ++r) {
    const T* __restrict source = static_cast<const T*>(job.x) + job.rows[r] * job.row_stride;
    T* __restrict target = static_cast<T*>(job.out) + r * columns;
    if (job.column_stride == 1) {
      scale_row(source, 1, columns, job.scale[r], target);
    } else {
      scale_row(source, job.column_stride, columns, job.scale[r], target);
    }
  }
}

// A function of its own for each type, because compilers clone functions, not templates.
MS_CLONES void gather_float32(const Gather& job, int64_t begin, int64_t end) { gather<float>(job, begin, end); }
MS_CLONES void gather_float64(const Gather& job, int64_t begin, int64_t end) { gather<double>(job, begin, end); }
MS_CLONES void gather_float16(const Gather& job, int64_t begin, int64_t end) { gather<Float16>(job, begin, end); }
MS_CLONES void gather_bfloat16(const Gather& job, int64_t begin, int64_t end) { gather<BFloat16>(job, begin, end); }

}  // namespace
}  // namespace memsave

// Returns -1, or the position of the first row index outside [0, n_rows), with nothing written.
MS_EXPORT int64_t ms_gather_rows(const void* x, int64_t dtype, int64_t n_rows, int64_t columns, int64_t row_stride,
                                 int64_t column_stride, const int32_t* rows, int64_t k, const float* scale, void* out) {
  using namespace memsave;
  for (int64_t r = 0; r < k; ++r) {
    if (rows[r] < 0 || rows[r] >= n_rows) return r;
  }
  if (columns == 0) return -1;
  const Gather job{x, row_stride, column_stride, columns, rows, scale, out};
  const int64_t grain = std::max<int64_t>(1, kGrainElements / columns);
  parallel_for(k, grain, [&job, dtype](int64_t begin, int64_t end) {
    switch (dtype) {
      case kFloat32: return gather_float32(job, begin, end);
      case kFloat64: return gather_float64(job, begin, end);
      case kFloat16: return gather_float16(job, begin, end);
      default: return gather_bfloat16(job, begin, end);
    }
  });
  return -1;
}
