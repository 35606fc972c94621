// The gradients of RMSNorm in one pass over memory: dx row by row, dweight as sums over fixed blocks of rows.
//
// x and dy (N, D) with row strides, rstd (N,), scale (D,) in the type of rstd, or null; dx (N, D), dweight (D,). Rows are
// divided into blocks by N alone, and the blocks' sums are added in a fixed order, so no result depends on the number of threads.
#include "row_blocks.h"

namespace memsave {
namespace {

// Enough blocks for 32 threads, and short sums; with many rows, the blocks' sums take 1/128 of x.
constexpr int64_t kBlocks = 32, kMinBlockRows = 16, kMaxBlockRows = 256;

struct Gradients {
  const char *dy, *x;
  int64_t dy_dtype, dy_row_bytes, x_dtype, x_row_bytes, rows, columns;
  const void *rstd, *scale;
  char* dx;
  void* sums;  // (blocks, 2, D): the block's sum, and that of its last rows; null where dweight is not needed
};

int64_t block_rows(int64_t n) {
  return std::min(kMaxBlockRows, std::max(kMinBlockRows, (n + kBlocks - 1) / kBlocks));
}

// How many rows are added to each other before they are added to their block's sum: the root of their number, because
// rounding errors grow with the length of either sum.
int64_t flush_rows(int64_t n) {
  int64_t rows = 1;
  while (rows * rows < block_rows(n)) ++rows;
  return rows;
}

int64_t blocks_of(int64_t n) { return (n + block_rows(n) - 1) / block_rows(n); }

// A part of a row: the upstream gradient, dxhat = dy * scale, and xhat = x * rstd.
template <class T>
struct Part {
  T dy_buffer[kBlock], x_buffer[kBlock], dxhat_buffer[kBlock], xhat[kBlock];
  const T *dy, *dxhat;

  MS_INLINE void read(const Gradients& job, int64_t row, T rstd, int64_t start, int64_t n) {
    dy = load(job.dy + row * job.dy_row_bytes, job.dy_dtype, start, n, dy_buffer);
    const T* x = load(job.x + row * job.x_row_bytes, job.x_dtype, start, n, x_buffer);
    for (int64_t j = 0; j < n; ++j) xhat[j] = x[j] * rstd;
    dxhat = dy;
    if (job.scale == nullptr) return;
    const T* scale = static_cast<const T*>(job.scale) + start;
    for (int64_t j = 0; j < n; ++j) dxhat_buffer[j] = dy[j] * scale[j];
    dxhat = dxhat_buffer;
  }
};

template <class T>
MS_INLINE void one_row(const Gradients& job, int64_t row, T* sums) {
  const int64_t columns = job.columns;
  const T rstd = static_cast<const T*>(job.rstd)[row];
  char* dx = job.dx + row * row_bytes(job.x_dtype, columns);
  Part<T> part;
  RowSum<T, 64 / sizeof(T)> products(columns);
  for (int64_t start = 0; start < columns; start += kBlock) {
    const int64_t n = std::min(kBlock, columns - start);
    part.read(job, row, rstd, start, n);
    products.add(part.dxhat, part.xhat, n);
  }
  const T mean = products.total() / static_cast<T>(columns);
  T values[kBlock];
  for (int64_t start = 0; start < columns; start += kBlock) {
    const int64_t n = std::min(kBlock, columns - start);
    if (columns > kBlock) part.read(job, row, rstd, start, n);
    for (int64_t j = 0; j < n; ++j) values[j] = (part.dxhat[j] - part.xhat[j] * mean) * rstd;
    store(values, dx, job.x_dtype, start, n);
    if (sums == nullptr) continue;
    for (int64_t j = 0; j < n; ++j) sums[start + j] += part.dy[j] * part.xhat[j];
  }
}

template <class T>
MS_INLINE void add_to(T* total, T* part, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    total[j] += part[j];
    part[j] = T(0);
  }
}

template <class T>
MS_INLINE void gradients(const Gradients& job, int64_t begin, int64_t end) {
  const int64_t columns = job.columns, size = block_rows(job.rows), flush = flush_rows(job.rows);
  for (int64_t block = begin; block < end; ++block) {
    T* total = job.sums == nullptr ? nullptr : static_cast<T*>(job.sums) + block * 2 * columns;
    T* recent = total == nullptr ? nullptr : total + columns;
    if (total != nullptr) std::fill(total, total + 2 * columns, T(0));
    const int64_t first = block * size, last = std::min(job.rows, first + size);
    for (int64_t row = first; row < last; ++row) {
      one_row<T>(job, row, recent);
      if (total != nullptr && ((row - first) % flush == flush - 1 || row == last - 1)) {
        add_to(total, recent, columns);
      }
    }
  }
}

template <class T>
MS_INLINE void combine(const Gradients& job, int64_t blocks, void* dweight, int64_t dtype) {
  T* total = static_cast<T*>(job.sums);
  if (blocks == 0) std::fill(total, total + job.columns, T(0));
  for (int64_t step = 1; step < blocks; step *= 2) {  // by pairs, and pairs of pairs
    for (int64_t block = 0; block + step < blocks; block += 2 * step) {
      add_to(total + block * 2 * job.columns, total + (block + step) * 2 * job.columns, job.columns);
    }
  }
  store(total, dweight, dtype, 0, job.columns);
}

// A function of its own for each type, because compilers clone functions, not templates.
MS_CLONES void gradients_float(const Gradients& job, int64_t begin, int64_t end) { gradients<float>(job, begin, end); }
MS_CLONES void gradients_double(const Gradients& job, int64_t begin, int64_t end) { gradients<double>(job, begin, end); }
MS_CLONES void combine_float(const Gradients& job, int64_t blocks, void* dweight, int64_t dtype) {
  combine<float>(job, blocks, dweight, dtype);
}
MS_CLONES void combine_double(const Gradients& job, int64_t blocks, void* dweight, int64_t dtype) {
  combine<double>(job, blocks, dweight, dtype);
}

}  // namespace
}  // namespace memsave

// What the sums of dweight take, in elements of the type of rstd: at least (D,), for the sum of no rows.
MS_EXPORT int64_t ms_rms_norm_backward_scratch(int64_t n_rows, int64_t columns) {
  return std::max<int64_t>(1, memsave::blocks_of(n_rows)) * 2 * columns;
}

// float64 for everything, or float32 for rstd, scale and scratch and any other type for the rest. scratch is null where
// dweight is not needed.
MS_EXPORT int64_t ms_rms_norm_backward(const void* dy, int64_t dy_dtype, int64_t dy_row_stride, const void* x,
                                       int64_t x_dtype, int64_t x_row_stride, int64_t n_rows, int64_t columns,
                                       const void* rstd, const void* scale, void* dx, void* dweight,
                                       int64_t dweight_dtype, void* scratch) {
  using namespace memsave;
  const Gradients job{static_cast<const char*>(dy), static_cast<const char*>(x), dy_dtype,
                      row_bytes(dy_dtype, dy_row_stride), x_dtype, row_bytes(x_dtype, x_row_stride), n_rows, columns,
                      rstd, scale, static_cast<char*>(dx), scratch};
  const bool wide = x_dtype == kFloat64;
  const int64_t blocks = blocks_of(n_rows);
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    wide ? gradients_double(job, begin, end) : gradients_float(job, begin, end);
  });
  if (scratch != nullptr) {
    wide ? combine_double(job, blocks, dweight, dweight_dtype) : combine_float(job, blocks, dweight, dweight_dtype);
  }
  return 0;
}
