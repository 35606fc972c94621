// The gradient of an activation function from its input, in one pass over memory.
//
// dy and x (N, F) with row strides; dx (N, F) contiguous; all of one type.
#include "activations.h"

namespace memsave {
namespace {

struct Job {
  Pieces pieces;
  Rows dy, x;
  void* dx;
};

template <class Function>
MS_INLINE void gradients_of(const Job& job, int64_t begin, int64_t end) {
  float dy_buffer[kBlock], x_buffer[kBlock], dx_buffer[kBlock];
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t n = job.pieces.size(piece);
    const float* dy = job.pieces.read(job.dy, piece, dy_buffer);
    const float* x = job.pieces.read(job.x, piece, x_buffer);
    float* __restrict dx = job.pieces.place(job.dx, piece, dx_buffer);
    for (int64_t j = 0; j < n; ++j) dx[j] = Function::gradient(dy[j], x[j]);
    job.pieces.write(dx, job.dx, piece);
  }
}

MS_CLONES void run(const Job& job, int64_t kind, int64_t begin, int64_t end) {
  MS_WITH_ACTIVATION(kind, gradients_of, job, begin, end)
}

}  // namespace
}  // namespace memsave

// Any type but float64.
MS_EXPORT int64_t ms_activation_backward(int64_t dtype, int64_t n_rows, int64_t columns, int64_t kind, const void* dy,
                                         int64_t dy_stride, const void* x, int64_t x_stride, void* dx) {
  using namespace memsave;
  const Job job{{dtype, n_rows, columns}, {dy, dy_stride}, {x, x_stride}, dx};
  parallel_for(job.pieces.count(), kPiecesPerThread,
               [&](int64_t begin, int64_t end) { run(job, kind, begin, end); });
  return 0;
}
