// The gradients of act(gate) * up from both inputs, in one pass over memory.
//
// dh, gate and up (N, F) with row strides; dgate and dup (N, F) contiguous; all of one type.
#include "activations.h"

namespace memsave {
namespace {

struct Job {
  Pieces pieces;
  Rows dh, gate, up;
  void *dgate, *dup;
};

template <class Function>
MS_INLINE void gradients_of(const Job& job, int64_t begin, int64_t end) {
  float dh_buffer[kBlock], gate_buffer[kBlock], up_buffer[kBlock], dgate_buffer[kBlock], dup_buffer[kBlock];
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t n = job.pieces.size(piece);
    const float* dh = job.pieces.read(job.dh, piece, dh_buffer);
    const float* gate = job.pieces.read(job.gate, piece, gate_buffer);
    const float* up = job.pieces.read(job.up, piece, up_buffer);
    float* __restrict dgate = job.pieces.place(job.dgate, piece, dgate_buffer);
    float* __restrict dup = job.pieces.place(job.dup, piece, dup_buffer);
    for (int64_t j = 0; j < n; ++j) {
      dgate[j] = Function::gradient(dh[j] * up[j], gate[j]);
      dup[j] = dh[j] * Function::value(gate[j]);
    }
    job.pieces.write(dgate, job.dgate, piece);
    job.pieces.write(dup, job.dup, piece);
  }
}

MS_CLONES void run(const Job& job, int64_t kind, int64_t begin, int64_t end) {
  MS_WITH_ACTIVATION(kind, gradients_of, job, begin, end)
}

}  // namespace
}  // namespace memsave

// Any type but float64.
MS_EXPORT int64_t ms_gated_activation_backward(int64_t dtype, int64_t n_rows, int64_t columns, int64_t kind,
                                               const void* dh, int64_t dh_stride, const void* gate,
                                               int64_t gate_stride, const void* up, int64_t up_stride, void* dgate,
                                               void* dup) {
  using namespace memsave;
  const Job job{{dtype, n_rows, columns}, {dh, dh_stride}, {gate, gate_stride}, {up, up_stride}, dgate, dup};
  parallel_for(job.pieces.count(), kPiecesPerThread,
               [&](int64_t begin, int64_t end) { run(job, kind, begin, end); });
  return 0;
}
