// RMSNorm: a row's statistic, then the row, normalized, scaled and rounded, in one pass over memory.
//
// x (N, D) with a row stride, scale (D,) in the statistic's type, or null; y (N, D) contiguous; rstd (N,). Bit-equal to
// memsave/ops/rms_norm/reference.py where `vector_bytes` is the width of torch's vectors.
#include <cmath>

#include "row_blocks.h"

namespace memsave {
namespace {

constexpr int64_t kGrainElements = 1 << 15;

struct Norm {
  const char* x;
  int64_t x_dtype, columns, x_row_bytes;
  const void* scale;
  double eps;
  int64_t round_dtype;  // what x * rstd is rounded to before it is scaled
  char* y;
  int64_t y_dtype;
  void* rstd;
};

template <class T, int kLanes>
MS_INLINE T inverse_root(const Norm& job, const char* row) {
  T buffer[kBlock];
  RowSum<T, kLanes> squares(job.columns);
  for (int64_t start = 0; start < job.columns; start += kBlock) {
    const int64_t n = std::min(kBlock, job.columns - start);
    const T* x = load(row, job.x_dtype, start, n, buffer);
    squares.add(x, x, n);
  }
  return T(1) / std::sqrt(squares.total() / static_cast<T>(job.columns) + static_cast<T>(job.eps));
}

template <class T>
MS_INLINE void normalize_row(const Norm& job, const char* row, T rstd, char* out) {
  T buffer[kBlock], values[kBlock];
  const T* scale = static_cast<const T*>(job.scale);
  for (int64_t start = 0; start < job.columns; start += kBlock) {
    const int64_t n = std::min(kBlock, job.columns - start);
    const T* x = load(row, job.x_dtype, start, n, buffer);
    for (int64_t j = 0; j < n; ++j) values[j] = x[j] * rstd;
    round_to(job.round_dtype, values, n);
    if (scale != nullptr) {
      for (int64_t j = 0; j < n; ++j) values[j] = scale[start + j] * values[j];
    }
    store(values, out, job.y_dtype, start, n);
  }
}

template <class T, int kLanes>
MS_INLINE void normalize(const Norm& job, int64_t begin, int64_t end) {
  const int64_t y_row_bytes = row_bytes(job.y_dtype, job.columns);
  for (int64_t r = begin; r < end; ++r) {
    const char* row = job.x + r * job.x_row_bytes;
    const T rstd = inverse_root<T, kLanes>(job, row);
    static_cast<T*>(job.rstd)[r] = rstd;
    normalize_row<T>(job, row, rstd, job.y + r * y_row_bytes);
  }
}

// A function of its own for each width, because compilers clone functions, not templates.
#define MS_FOR_WIDTH(name, T, lanes) \
  MS_CLONES void name(const Norm& job, int64_t begin, int64_t end) { normalize<T, lanes>(job, begin, end); }
MS_FOR_WIDTH(float_by_8, float, 8)
MS_FOR_WIDTH(float_by_4, float, 4)
MS_FOR_WIDTH(float_by_1, float, 1)
MS_FOR_WIDTH(double_by_4, double, 4)
MS_FOR_WIDTH(double_by_2, double, 2)
MS_FOR_WIDTH(double_by_1, double, 1)
#undef MS_FOR_WIDTH

using Normalize = void (*)(const Norm&, int64_t, int64_t);

// Rows shorter than a vector are summed one by one, as in torch.
Normalize for_width(bool wide, int64_t vector_bytes, int64_t columns) {
  const int64_t lanes = vector_bytes / (wide ? 8 : 4);
  if (columns < lanes) return wide ? double_by_1 : float_by_1;
  if (vector_bytes >= 32) return wide ? double_by_4 : float_by_8;
  return wide ? double_by_2 : float_by_4;
}

}  // namespace
}  // namespace memsave

// float64 for x, scale, y and rstd, or float32 for scale and rstd and any other type for x and y.
MS_EXPORT int64_t ms_rms_norm(const void* x, int64_t x_dtype, int64_t n_rows, int64_t columns, int64_t row_stride,
                              const void* scale, double eps, int64_t round_dtype, int64_t vector_bytes, void* y,
                              int64_t y_dtype, void* rstd) {
  using namespace memsave;
  const Norm job{static_cast<const char*>(x), x_dtype, columns, row_bytes(x_dtype, row_stride), scale, eps, round_dtype,
                 static_cast<char*>(y), y_dtype, rstd};
  const Normalize normalize = for_width(x_dtype == kFloat64, vector_bytes, columns);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, columns));
  parallel_for(n_rows, grain, [&](int64_t begin, int64_t end) { normalize(job, begin, end); });
  return 0;
}
