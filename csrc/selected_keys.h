// For attention to chosen keys, one list for each row: products with four rows at once, and sums of four rows.
//
// B sequences, h query and kv key/value heads (g = h / kv), R rows of queries, S keys, head sizes D and E, K keys in a list.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>

#include "exponential.h"
#include "token_tiles.h"

namespace memsave {

constexpr int64_t kMaxHead = 256;  // D and E
constexpr int64_t kAtOnce = 4, kTile = 64;

// A tensor (B, heads, rows, features) whose features are neighbours in memory.
struct Rows {
  const void* values;
  int64_t batch_stride, head_stride, row_stride;

  template <class T>
  MS_INLINE const T* at(int64_t b, int64_t h, int64_t r) const {
    return static_cast<const T*>(values) + b * batch_stride + h * head_stride + r * row_stride;
  }
};

struct Lists {
  const int32_t* values;  // (B, kv, R, K) contiguous: ascending, then -1
  int64_t groups, rows, length;

  MS_INLINE const int32_t* at(int64_t b, int64_t g, int64_t r) const {
    return values + ((b * groups + g) * rows + r) * length;
  }

  MS_INLINE int64_t count(const int32_t* list) const {
    return std::partition_point(list, list + length, [](int32_t key) { return key >= 0; }) - list;
  }
};

// Whether a list has ascending keys in [0, keys), then -1. Without an early end, so that it vectorizes: a kernel that trusted
// its lists would read wherever a damaged one points.
MS_CLONES static bool is_list(const int32_t* list, int64_t length, int32_t keys) {
  if (length == 0) return true;
  int32_t wrong = (list[0] < -1) | (list[0] >= keys);
  for (int64_t i = 1; i < length; ++i) {
    const int32_t key = list[i], before = list[i - 1];
    wrong |= (key != -1) & ((before < 0) | (key <= before) | (key >= keys));
  }
  return wrong == 0;
}

// The number of the first of `count` lists that is none; -1 if all are.
inline int64_t first_wrong_list(const Lists& lists, int64_t count, int64_t keys) {
  constexpr int64_t kGrainElements = 1 << 15, kNoList = INT64_MAX;
  const int32_t behind = static_cast<int32_t>(std::min<int64_t>(keys, INT32_MAX));
  std::atomic<int64_t> first{kNoList};
  parallel_for(count, 1 + kGrainElements / (1 + lists.length), [&](int64_t begin, int64_t end) {
    while (begin < end && is_list(lists.values + begin * lists.length, lists.length, behind)) ++begin;
    int64_t seen = first.load();
    while (begin < end && begin < seen && !first.compare_exchange_weak(seen, begin)) {
    }
  });
  return first == kNoList ? -1 : first.load();
}

MS_INLINE float exponential(float x) { return exp_of(x); }
MS_INLINE double exponential(double x) { return std::exp(x); }

// A row in the type of the sums: where it is, or widened into `buffer`.
MS_INLINE const float* wide_row(const float* row, int64_t, float*) { return row; }
MS_INLINE const double* wide_row(const double* row, int64_t, double*) { return row; }
template <class Half>
MS_INLINE const float* wide_row(const Half* row, int64_t n, float* buffer) {
  for (int64_t j = 0; j < n; ++j) buffer[j] = Half::widen(row[j].bits);
  return buffer;
}

MS_INLINE void narrow_to(float value, float& target) { target = value; }
MS_INLINE void narrow_to(double value, double& target) { target = value; }
template <class Half>
MS_INLINE void narrow_to(float value, Half& target) {
  target.bits = static_cast<uint16_t>(Half::narrow(value));
}

// Four rows of a matrix, chosen by their numbers; numbers behind the last are those of the last.
template <class T, class Wide>
struct Four {
  const Wide* rows[kAtOnce];
  Wide buffer[sizeof(T) < 4 ? kAtOnce * kMaxHead : 1];

  MS_INLINE void load(const T* matrix, int64_t stride, const int32_t* list, int64_t count, int64_t features) {
    for (int64_t i = 0; i < kAtOnce; ++i) {
      const int64_t place = sizeof(T) < 4 ? i * kMaxHead : 0;
      rows[i] = wide_row(matrix + list[std::min(i, count - 1)] * stride, features, buffer + place);
    }
  }
};

// out[i] = x rows[i]. Written out so that compilers keep all lanes in registers.
template <class Wide>
MS_INLINE void four_products(const Wide* x, const Wide* const* rows, int64_t features, Wide* out) {
  const Wide *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
  Wide lanes[4][kSide] = {}, eight[4][8], four[4][4];
  const int64_t whole = features / kSide * kSide;
  for (int64_t j = 0; j < whole; j += kSide) {
    for (int64_t i = 0; i < kSide; ++i) {
      const Wide value = x[j + i];
      lanes[0][i] += value * r0[j + i];
      lanes[1][i] += value * r1[j + i];
      lanes[2][i] += value * r2[j + i];
      lanes[3][i] += value * r3[j + i];
    }
  }
  for (int i = 0; i < 8; ++i) {
    eight[0][i] = lanes[0][i] + lanes[0][i + 8];
    eight[1][i] = lanes[1][i] + lanes[1][i + 8];
    eight[2][i] = lanes[2][i] + lanes[2][i + 8];
    eight[3][i] = lanes[3][i] + lanes[3][i + 8];
  }
  for (int i = 0; i < 4; ++i) {
    four[0][i] = eight[0][i] + eight[0][i + 4];
    four[1][i] = eight[1][i] + eight[1][i + 4];
    four[2][i] = eight[2][i] + eight[2][i + 4];
    four[3][i] = eight[3][i] + eight[3][i + 4];
  }
  for (int e = 0; e < 4; ++e) out[e] = (four[e][0] + four[e][2]) + (four[e][1] + four[e][3]);
  for (int64_t j = whole; j < features; ++j) {
    out[0] += x[j] * r0[j], out[1] += x[j] * r1[j], out[2] += x[j] * r2[j], out[3] += x[j] * r3[j];
  }
}

// sums += the sum over i of factors[i] * rows[i].
template <class Wide>
MS_INLINE void add_four(const Wide* factors, const Wide* const* rows, int64_t features, Wide* __restrict sums) {
  const Wide *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
  const Wide f0 = factors[0], f1 = factors[1], f2 = factors[2], f3 = factors[3];
  for (int64_t j = 0; j < features; ++j) sums[j] += (f0 * r0[j] + f1 * r1[j]) + (f2 * r2[j] + f3 * r3[j]);
}

}  // namespace memsave
