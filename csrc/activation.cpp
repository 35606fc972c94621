// An activation function of every element, in one pass over memory.
//
// x (N, F) with a row stride; y (N, F) contiguous, of the same type.
#include "activations.h"

namespace memsave {
namespace {

struct Job {
  Pieces pieces;
  Rows x;
  void* y;
};

template <class Function>
MS_INLINE void values_of(const Job& job, int64_t begin, int64_t end) {
  float x_buffer[kBlock], y_buffer[kBlock];
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t n = job.pieces.size(piece);
    const float* x = job.pieces.read(job.x, piece, x_buffer);
    float* __restrict y = job.pieces.place(job.y, piece, y_buffer);
    for (int64_t j = 0; j < n; ++j) y[j] = Function::value(x[j]);
    job.pieces.write(y, job.y, piece);
  }
}

MS_CLONES void run(const Job& job, int64_t kind, int64_t begin, int64_t end) {
  MS_WITH_ACTIVATION(kind, values_of, job, begin, end)
}

}  // namespace
}  // namespace memsave

// Any type but float64.
MS_EXPORT int64_t ms_activation(int64_t dtype, int64_t n_rows, int64_t columns, int64_t kind, const void* x,
                                int64_t x_stride, void* y) {
  using namespace memsave;
  const Job job{{dtype, n_rows, columns}, {x, x_stride}, y};
  parallel_for(job.pieces.count(), kPiecesPerThread,
               [&](int64_t begin, int64_t end) { run(job, kind, begin, end); });
  return 0;
}
