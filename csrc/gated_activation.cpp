// act(gate) * up in one pass over memory; half types round act(gate) first, as plain PyTorch does.
//
// gate and up (N, F) with row strides; h (N, F) contiguous; all of one type.
#include "activations.h"

namespace memsave {
namespace {

struct Job {
  Pieces pieces;
  Rows gate, up;
  void* h;
};

template <class Function>
MS_INLINE void products_of(const Job& job, int64_t begin, int64_t end) {
  float gate_buffer[kBlock], up_buffer[kBlock], h_buffer[kBlock];
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t n = job.pieces.size(piece);
    const float* gate = job.pieces.read(job.gate, piece, gate_buffer);
    const float* up = job.pieces.read(job.up, piece, up_buffer);
    float* __restrict h = job.pieces.place(job.h, piece, h_buffer);
    for (int64_t j = 0; j < n; ++j) h[j] = Function::value(gate[j]);
    round_to(job.pieces.dtype, h, n);
    for (int64_t j = 0; j < n; ++j) h[j] *= up[j];
    job.pieces.write(h, job.h, piece);
  }
}

MS_CLONES void run(const Job& job, int64_t kind, int64_t begin, int64_t end) {
  MS_WITH_ACTIVATION(kind, products_of, job, begin, end)
}

}  // namespace
}  // namespace memsave

// Any type but float64.
MS_EXPORT int64_t ms_gated_activation(int64_t dtype, int64_t n_rows, int64_t columns, int64_t kind, const void* gate,
                                      int64_t gate_stride, const void* up, int64_t up_stride, void* h) {
  using namespace memsave;
  const Job job{{dtype, n_rows, columns}, {gate, gate_stride}, {up, up_stride}, h};
  parallel_for(job.pieces.count(), kPiecesPerThread,
               [&](int64_t begin, int64_t end) { run(job, kind, begin, end); });
  return 0;
}
