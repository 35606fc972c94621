// The gradients of RMSNorm: see norm_backward.h.
#include "norm_backward.h"

namespace memsave {
namespace {

// A function of its own for each type, because compilers clone functions, not templates.
MS_CLONES void gradients_float(const Gradients& job, int64_t begin, int64_t end) {
  gradients<float, false>(job, begin, end);
}
MS_CLONES void gradients_double(const Gradients& job, int64_t begin, int64_t end) {
  gradients<double, false>(job, begin, end);
}
MS_CLONES void sum_float(const Gradients& job, int64_t blocks, void* dweight, int64_t dtype) {
  combine(job.totals, blocks, job.columns);
  store_totals<float>(job.totals, dweight, dtype, job.columns);
}
MS_CLONES void sum_double(const Gradients& job, int64_t blocks, void* dweight, int64_t dtype) {
  combine(job.totals, blocks, job.columns);
  store_totals<double>(job.totals, dweight, dtype, job.columns);
}

}  // namespace
}  // namespace memsave

// element_bytes: 8 for float64, else 4.
MS_EXPORT int64_t ms_rms_norm_backward_scratch_bytes(int64_t n_rows, int64_t columns, int64_t element_bytes) {
  return memsave::scratch_bytes(n_rows, columns, 1, element_bytes);
}

// float64 for everything, or float32 for rstd and scale and any other type for the rest. scratch is null where
// dweight is not needed.
MS_EXPORT int64_t ms_rms_norm_backward(const void* dy, int64_t dy_dtype, int64_t dy_row_stride, const void* x,
                                       int64_t x_dtype, int64_t x_row_stride, int64_t n_rows, int64_t columns,
                                       const void* rstd, const void* scale, void* dx, void* dweight,
                                       int64_t dweight_dtype, void* scratch) {
  using namespace memsave;
  const Gradients job{static_cast<const char*>(dy), static_cast<const char*>(x), dy_dtype,
                      row_bytes(dy_dtype, dy_row_stride), x_dtype, row_bytes(x_dtype, x_row_stride), n_rows, columns,
                      rstd, scale, static_cast<char*>(dx), static_cast<double*>(scratch),
                      recent_in(scratch, n_rows, columns, 1)};
  const bool wide = x_dtype == kFloat64;
  const int64_t blocks = blocks_of(n_rows);
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    wide ? gradients_double(job, begin, end) : gradients_float(job, begin, end);
  });
  if (scratch != nullptr) {
    wide ? sum_double(job, blocks, dweight, dweight_dtype) : sum_float(job, blocks, dweight, dweight_dtype);
  }
  return 0;
}
