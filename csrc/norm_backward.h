// The gradients of RMSNorm and LayerNorm in one pass over memory: dx row by row, those of weight and bias as sums over
// fixed blocks of rows.
//
// x and dy (N, D) with row strides, rstd (N,), scale (D,) in the type of rstd, or null; dx (N, D); sums of (D,). With
// xhat = (x - mean) * rstd, where RMSNorm has no mean, and dxhat = dy * scale:
// dx = (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)) * rstd, and the sums are those of dy * xhat and of dy.
//
// Rows are divided into blocks by N alone, and the blocks' sums are added in a fixed order, so no result depends on the
// number of threads. Two rows are read at a time: while one waits for its mean, the processor works on the other. More
// of them would not fit into the nearest cache.
#pragma once

#include "row_blocks.h"

namespace memsave {

// Enough blocks for 32 threads; with many rows, the blocks' sums take 3/256 of x in float32, for LayerNorm twice that.
constexpr int64_t kBlocks = 32, kMinBlockRows = 16, kMaxBlockRows = 256;
constexpr int64_t kGroup = 2;

struct Gradients {
  const char *dy, *x;
  int64_t dy_dtype, dy_row_bytes, x_dtype, x_row_bytes, rows, columns;
  const void *rstd, *scale;
  char* dx;
  double* totals;  // (blocks, kSums, D), or null where no sums are needed
  void* recent;    // (blocks, kSums, D): sums of the last few rows, not yet in the totals
};

MS_INLINE int64_t block_rows(int64_t n) {
  return std::min(kMaxBlockRows, std::max(kMinBlockRows, (n + kBlocks - 1) / kBlocks));
}

// How many rows are added to each other before they are added to their block's total, in double: rounding errors grow
// with the length of a sum. A multiple of the group.
constexpr int64_t kFlushRows = 8;

MS_INLINE int64_t blocks_of(int64_t n) { return (n + block_rows(n) - 1) / block_rows(n); }

// Adds 2 * kHalf lanes by pairs, and pairs of pairs.
template <int64_t kHalf, class T>
MS_INLINE T fold(T* lanes) {
  for (int64_t k = 0; k < kHalf; ++k) lanes[k] += lanes[k + kHalf];
  if constexpr (kHalf > 1) fold<kHalf / 2>(lanes);
  return lanes[0];
}

// A sum in several lanes at once, so that it vectorizes and rounding errors stay small.
template <class T>
struct Lanes {
  static constexpr int64_t kCount = 128 / sizeof(T);
  T lanes[kCount] = {};
  T tail = T(0);

  MS_INLINE T total() { return fold<kCount / 2>(lanes) + tail; }
};

template <class T>
MS_INLINE T sum_of(const T* a, int64_t n) {
  Lanes<T> sum;
  int64_t j = 0;
  for (; j + sum.kCount <= n; j += sum.kCount) {
    for (int64_t k = 0; k < sum.kCount; ++k) sum.lanes[k] += a[j + k];
  }
  for (; j < n; ++j) sum.tail += a[j];
  return sum.total();
}

template <class T, bool kCentered>
struct Row {
  T x_buffer[kBlock], dy_buffer[kBlock];
  const T *x = nullptr, *dy = nullptr;
  T rstd, mean = T(0), dxhat_mean = T(0), product_mean = T(0);
  int64_t index, block = -1;

  // The block of columns [start, start + n), unless it is there already.
  MS_INLINE void read(const Gradients& job, int64_t start, int64_t n) {
    if (start == block) return;
    x = load(job.x + index * job.x_row_bytes, job.x_dtype, start, n, x_buffer);
    dy = load(job.dy + index * job.dy_row_bytes, job.dy_dtype, start, n, dy_buffer);
    block = start;
  }

  MS_INLINE void open(const Gradients& job, int64_t row) {
    index = row;
    rstd = static_cast<const T*>(job.rstd)[row];
    if (!kCentered) return;
    for (int64_t start = 0; start < job.columns; start += kBlock) {
      const int64_t n = std::min(kBlock, job.columns - start);
      read(job, start, n);
      mean += sum_of(x, n);
    }
    mean /= static_cast<T>(job.columns);
  }

  MS_INLINE void add(const T* scale, int64_t n) {
    Lanes<T> dxhats, products;
    int64_t j = 0;
    for (; j + dxhats.kCount <= n; j += dxhats.kCount) {
      for (int64_t k = 0; k < dxhats.kCount; ++k) {
        const T dxhat = dy[j + k] * scale[j + k];
        if (kCentered) dxhats.lanes[k] += dxhat;
        products.lanes[k] += dxhat * ((x[j + k] - mean) * rstd);
      }
    }
    for (; j < n; ++j) {
      const T dxhat = dy[j] * scale[j];
      if (kCentered) dxhats.tail += dxhat;
      products.tail += dxhat * ((x[j] - mean) * rstd);
    }
    if (kCentered) dxhat_mean += dxhats.total();
    product_mean += products.total();
  }

  MS_INLINE void write(const Gradients& job, const T* scale, int64_t start, int64_t n) const {
    T values[kBlock];
    for (int64_t j = 0; j < n; ++j) {
      values[j] = (dy[j] * scale[j] - dxhat_mean - (x[j] - mean) * rstd * product_mean) * rstd;
    }
    store(values, job.dx + index * row_bytes(job.x_dtype, job.columns), job.x_dtype, start, n);
  }
};

// Adds dy * xhat and, where rows are centered, dy of a group of rows.
template <class T, bool kCentered, int64_t kRows>
MS_INLINE void add_to_sums(const Row<T, kCentered>* rows, T* __restrict product_sums, T* __restrict dy_sums, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    T products = T(0), dys = T(0);
    for (int64_t i = 0; i < kRows; ++i) {
      products += rows[i].dy[j] * ((rows[i].x[j] - rows[i].mean) * rows[i].rstd);
      dys += rows[i].dy[j];
    }
    product_sums[j] += products;
    if (kCentered) dy_sums[j] += dys;
  }
}

template <class T, bool kCentered, int64_t kRows>
MS_INLINE void group(const Gradients& job, const T* ones, int64_t first, T* sums) {
  const int64_t columns = job.columns;
  Row<T, kCentered> rows[kRows];
  for (int64_t i = 0; i < kRows; ++i) rows[i].open(job, first + i);
  for (int64_t start = 0; start < columns; start += kBlock) {
    const int64_t n = std::min(kBlock, columns - start);
    const T* scale = job.scale == nullptr ? ones : static_cast<const T*>(job.scale) + start;
    for (int64_t i = 0; i < kRows; ++i) {
      rows[i].read(job, start, n);
      rows[i].add(scale, n);
    }
  }
  for (int64_t i = 0; i < kRows; ++i) {
    rows[i].dxhat_mean /= static_cast<T>(columns);
    rows[i].product_mean /= static_cast<T>(columns);
  }
  for (int64_t start = 0; start < columns; start += kBlock) {
    const int64_t n = std::min(kBlock, columns - start);
    const T* scale = job.scale == nullptr ? ones : static_cast<const T*>(job.scale) + start;
    for (int64_t i = 0; i < kRows; ++i) {
      rows[i].read(job, start, n);
      rows[i].write(job, scale, start, n);
    }
    if (sums != nullptr) add_to_sums<T, kCentered, kRows>(rows, sums + start, sums + columns + start, n);
  }
}

template <class T>
MS_INLINE void add_to(double* __restrict total, T* __restrict part, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    total[j] += part[j];
    part[j] = T(0);
  }
}

template <class T, bool kCentered>
MS_INLINE void gradients(const Gradients& job, int64_t begin, int64_t end) {
  const int64_t width = job.columns * (kCentered ? 2 : 1), size = block_rows(job.rows);
  T ones[kBlock];
  std::fill(ones, ones + kBlock, T(1));
  for (int64_t block = begin; block < end; ++block) {
    const bool summed = job.totals != nullptr;
    double* total = summed ? job.totals + block * width : nullptr;
    T* recent = summed ? static_cast<T*>(job.recent) + block * width : nullptr;
    if (summed) std::fill(total, total + width, 0.0);
    if (summed) std::fill(recent, recent + width, T(0));
    const int64_t first = block * size, last = std::min(job.rows, first + size);
    for (int64_t row = first; row < last;) {
      const bool whole = row + kGroup <= last;
      whole ? group<T, kCentered, kGroup>(job, ones, row, recent) : group<T, kCentered, 1>(job, ones, row, recent);
      row += whole ? kGroup : 1;
      if (summed && ((row - first) % kFlushRows == 0 || row == last)) add_to(total, recent, width);
    }
  }
}

// Adds all blocks' totals to the first one's, by pairs, and pairs of pairs.
MS_INLINE void combine(double* totals, int64_t blocks, int64_t width) {
  if (blocks == 0) std::fill(totals, totals + width, 0.0);
  for (int64_t step = 1; step < blocks; step *= 2) {
    for (int64_t block = 0; block + step < blocks; block += 2 * step) {
      add_to(totals + block * width, totals + (block + step) * width, width);
    }
  }
}

// Rounds n totals into `out`, by way of T.
template <class T>
MS_INLINE void store_totals(const double* totals, void* out, int64_t dtype, int64_t n) {
  T values[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t size = std::min(kBlock, n - start);
    for (int64_t j = 0; j < size; ++j) values[j] = static_cast<T>(totals[start + j]);
    store(values, out, dtype, start, size);
  }
}

// How many bytes the totals of `sums` sums and, behind them, the recent ones take: at least a block's, for no rows.
MS_INLINE int64_t scratch_bytes(int64_t n_rows, int64_t columns, int64_t sums, int64_t element_bytes) {
  return std::max<int64_t>(1, blocks_of(n_rows)) * sums * columns * (8 + element_bytes);
}

// Where the recent sums begin in the scratch memory.
MS_INLINE void* recent_in(void* scratch, int64_t n_rows, int64_t columns, int64_t sums) {
  if (scratch == nullptr) return nullptr;
  return static_cast<double*>(scratch) + std::max<int64_t>(1, blocks_of(n_rows)) * sums * columns;
}

}  // namespace memsave
