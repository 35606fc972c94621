// The gradients of LayerNorm for inputs of 16 bits, computed in float: see norm_backward.h. float and double are left
// to torch, whose kernel is faster there.
#include "norm_backward.h"

namespace memsave {
namespace {

MS_CLONES void layer_norm_gradients(const Gradients& job, int64_t begin, int64_t end) {
  gradients<float, true>(job, begin, end);
}

MS_CLONES void layer_norm_sums(const Gradients& job, int64_t blocks, float* dweight, float* dbias) {
  combine(job.totals, blocks, 2 * job.columns);
  if (dweight != nullptr) store_totals<float>(job.totals, dweight, kFloat32, job.columns);
  if (dbias != nullptr) store_totals<float>(job.totals + job.columns, dbias, kFloat32, job.columns);
}

}  // namespace
}  // namespace memsave

MS_EXPORT int64_t ms_layer_norm_backward_scratch_bytes(int64_t n_rows, int64_t columns) {
  return memsave::scratch_bytes(n_rows, columns, 2, 4);
}

// Any type but float64 for dy and x. dweight or dbias is null where it is not needed, scratch where neither is.
MS_EXPORT int64_t ms_layer_norm_backward(const void* dy, int64_t dy_dtype, int64_t dy_row_stride, const void* x,
                                         int64_t x_dtype, int64_t x_row_stride, int64_t n_rows, int64_t columns,
                                         const float* rstd, const float* scale, void* dx, float* dweight, float* dbias,
                                         void* scratch) {
  using namespace memsave;
  const Gradients job{static_cast<const char*>(dy), static_cast<const char*>(x), dy_dtype,
                      row_bytes(dy_dtype, dy_row_stride), x_dtype, row_bytes(x_dtype, x_row_stride), n_rows, columns,
                      rstd, scale, static_cast<char*>(dx), static_cast<double*>(scratch),
                      recent_in(scratch, n_rows, columns, 2)};
  const int64_t blocks = blocks_of(n_rows);
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) { layer_norm_gradients(job, begin, end); });
  if (scratch != nullptr) layer_norm_sums(job, blocks, dweight, dbias);
  return 0;
}
