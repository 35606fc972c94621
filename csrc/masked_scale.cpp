// y = x * (scale where the packed bit is set, else 0): conversion to float, product and rounding in one pass.
//
// x and y (N, D), bits (N, B) with B = ceil(D / 8), least significant bit first; all contiguous.
#include <algorithm>

#include "row_blocks.h"

namespace memsave {
namespace {

constexpr int64_t kGrainElements = 1 << 15;

struct MaskedScale {
  const void* x;
  int64_t dtype, columns;
  const uint8_t* bits;
  double scale;
  void* y;
};

MS_INLINE uint32_t word_of(const uint8_t* bits) {
  return bits[0] | uint32_t{bits[1]} << 8 | uint32_t{bits[2]} << 16 | uint32_t{bits[3]} << 24;
}

// 32 elements at a time: a loop that is long enough for compilers to vectorize it instead of unrolling it.
template <class T>
MS_INLINE void scale_block(const T* x, const uint8_t* bits, int64_t n, T scale, T* y) {
  int64_t j = 0;
  for (; j + 32 <= n; j += 32) {
    const uint32_t word = word_of(bits + j / 8);
    for (uint32_t k = 0; k < 32; ++k) y[j + k] = x[j + k] * (word >> k & 1u ? scale : T(0));
  }
  for (; j < n; ++j) y[j] = x[j] * (bits[j / 8] >> (j % 8) & 1 ? scale : T(0));
}

template <class Half>
MS_INLINE void scale_row(const Half* x, const uint8_t* bits, int64_t n, double scale, Half* y) {
  float values[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t size = std::min(kBlock, n - start);
    widen_all(x + start, size, values);
    scale_block(values, bits + start / 8, size, static_cast<float>(scale), values);
    narrow_all(values, size, y + start);
  }
}

MS_INLINE void scale_row(const float* x, const uint8_t* bits, int64_t n, double scale, float* y) {
  scale_block(x, bits, n, static_cast<float>(scale), y);
}

MS_INLINE void scale_row(const double* x, const uint8_t* bits, int64_t n, double scale, double* y) {
  scale_block(x, bits, n, scale, y);
}

template <class T>
MS_INLINE void scale_rows(const MaskedScale& job, int64_t begin, int64_t end) {
  const int64_t bytes = (job.columns + 7) / 8;
  for (int64_t row = begin; row < end; ++row) {
    scale_row(static_cast<const T*>(job.x) + row * job.columns, job.bits + row * bytes, job.columns, job.scale,
              static_cast<T*>(job.y) + row * job.columns);
  }
}

MS_CLONES void scale_float32(const MaskedScale& job, int64_t begin, int64_t end) { scale_rows<float>(job, begin, end); }
MS_CLONES void scale_float64(const MaskedScale& job, int64_t begin, int64_t end) {
  scale_rows<double>(job, begin, end);
}
MS_CLONES void scale_float16(const MaskedScale& job, int64_t begin, int64_t end) {
  scale_rows<Float16>(job, begin, end);
}
MS_CLONES void scale_bfloat16(const MaskedScale& job, int64_t begin, int64_t end) {
  scale_rows<BFloat16>(job, begin, end);
}

}  // namespace
}  // namespace memsave

MS_EXPORT int64_t ms_masked_scale(const void* x, int64_t dtype, int64_t n_rows, int64_t columns, const uint8_t* bits,
                                  double scale, void* y) {
  using namespace memsave;
  if (columns == 0) return 0;
  const MaskedScale job{x, dtype, columns, bits, scale, y};
  const int64_t grain = std::max<int64_t>(1, kGrainElements / columns);
  parallel_for(n_rows, grain, [&job, dtype](int64_t begin, int64_t end) {
    switch (dtype) {
      case kFloat32: return scale_float32(job, begin, end);
      case kFloat64: return scale_float64(job, begin, end);
      case kFloat16: return scale_float16(job, begin, end);
      default: return scale_bfloat16(job, begin, end);
    }
  });
  return 0;
}
