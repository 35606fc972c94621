// For kernels that go over whole rows: blocks of a row in float or double, whatever the row's type, and sums over a row.
//
// D features of a row. A block has at most kBlock elements, so that its buffers stay in the nearest cache.
#pragma once

#include <algorithm>

#include "common.h"

namespace memsave {

constexpr int64_t kBlock = 1024;

template <class Half>
MS_INLINE void widen_all(const Half* source, int64_t n, float* target) {
  for (int64_t j = 0; j < n; ++j) target[j] = Half::widen(source[j].bits);
}

template <class Half>
MS_INLINE void narrow_all(const float* source, int64_t n, Half* target) {
  for (int64_t j = 0; j < n; ++j) target[j].bits = static_cast<uint16_t>(Half::narrow(source[j]));
}

// Elements [start, start + n) of a row: where they are, or widened into `buffer`.
MS_INLINE const float* load(const void* row, int64_t dtype, int64_t start, int64_t n, float* buffer) {
  switch (dtype) {
    case kFloat16: widen_all(static_cast<const Float16*>(row) + start, n, buffer); return buffer;
    case kBFloat16: widen_all(static_cast<const BFloat16*>(row) + start, n, buffer); return buffer;
    default: return static_cast<const float*>(row) + start;
  }
}

MS_INLINE const double* load(const void* row, int64_t, int64_t start, int64_t, double*) {
  return static_cast<const double*>(row) + start;
}

// Rounds to nearest, ties to even.
MS_INLINE void store(const float* values, void* row, int64_t dtype, int64_t start, int64_t n) {
  switch (dtype) {
    case kFloat16: return narrow_all(values, n, static_cast<Float16*>(row) + start);
    case kBFloat16: return narrow_all(values, n, static_cast<BFloat16*>(row) + start);
    default: std::copy(values, values + n, static_cast<float*>(row) + start);
  }
}

MS_INLINE void store(const double* values, void* row, int64_t, int64_t start, int64_t n) {
  std::copy(values, values + n, static_cast<double*>(row) + start);
}

// Rounds to a 16-bit format and back; any other type is left as it is.
MS_INLINE void round_to(int64_t dtype, float* values, int64_t n) {
  if (dtype == kFloat16) {
    for (int64_t j = 0; j < n; ++j) values[j] = Float16::widen(Float16::narrow(values[j]));
  } else if (dtype == kBFloat16) {
    for (int64_t j = 0; j < n; ++j) values[j] = BFloat16::widen(BFloat16::narrow(values[j]));
  }
}

MS_INLINE void round_to(int64_t, double*, int64_t) {}

MS_INLINE int64_t row_bytes(int64_t dtype, int64_t columns) {
  return columns * (dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2);
}

// The sum over j of a[j] * b[j] of a row, in the order in which torch sums a contiguous row on a CPU with vectors of
// kLanes elements (aten/src/ATen/native/cpu/SumKernel.cpp, cascade_sum): four vectors at a time, in sums of sums of up to
// four levels. So its error grows as slowly as torch's, and a mean of squares has the same bits.
template <class T, int kLanes>
class RowSum {
 public:
  explicit MS_INLINE RowSum(int64_t columns) {
    int64_t bits = 1;
    while (int64_t{1} << bits < columns / kWidth) ++bits;
    power_ = std::max<int64_t>(4, bits / kLevels);
  }

  // The next n elements: a multiple of 4 * kLanes, except for the last ones.
  MS_INLINE void add(const T* a, const T* b, int64_t n) {
    int64_t j = 0;
    for (; j + kWidth <= n; j += kWidth) {
      for (int k = 0; k < kWidth; ++k) levels_[0][k] += a[j + k] * b[j + k];
      if ((++groups_ & ((int64_t{1} << power_) - 1)) == 0) carry();
    }
    if (j < n) finish(a + j, b + j, n - j);
  }

  MS_INLINE T total() {
    if (!finished_) finish(nullptr, nullptr, 0);
    T sum = tail_;
    for (int k = 0; k < kLanes; ++k) sum += levels_[0][k];
    return sum;
  }

 private:
  static constexpr int kLevels = 4, kWidth = 4 * kLanes;

  MS_INLINE void carry() {
    const int64_t mask = (int64_t{1} << power_) - 1;
    for (int level = 1; level < kLevels; ++level) {
      for (int k = 0; k < kWidth; ++k) {
        levels_[level][k] += levels_[level - 1][k];
        levels_[level - 1][k] = T(0);
      }
      if (groups_ & mask << level * power_) break;
    }
  }

  // The levels, then the vectors that fill no group of four, then the group's four vectors, become levels_[0][:kLanes];
  // the elements that fill no vector become tail_.
  MS_INLINE void finish(const T* a, const T* b, int64_t n) {
    for (int level = 1; level < kLevels; ++level) {
      for (int k = 0; k < kWidth; ++k) levels_[0][k] += levels_[level][k];
    }
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
      for (int k = 0; k < kLanes; ++k) levels_[0][k] += a[j + k] * b[j + k];
    }
    for (int vector = 1; vector < 4; ++vector) {
      for (int k = 0; k < kLanes; ++k) levels_[0][k] += levels_[0][vector * kLanes + k];
    }
    for (; j < n; ++j) tail_ += a[j] * b[j];
    finished_ = true;
  }

  T levels_[kLevels][kWidth] = {};
  T tail_ = T(0);
  int64_t power_, groups_ = 0;
  bool finished_ = false;
};

}  // namespace memsave
