// For kernels on product-quantized keys: sums of table entries, in bytes, for many keys at once.
//
// S keys, M subspaces; codes (P, S), P = ceil(M / 2): subspace 2 p in the low four bits of row p, 2 p + 1 in the high ones.
// A table is (M, 16) bytes whose entries add up to 255 at most, so a byte holds every sum. With AVX2 one instruction looks 32
// keys up (André et al. 2015, "Cache locality is not enough").
#pragma once

#include <algorithm>

#include "common.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define MS_LOOKUP_AVX2 1
#include <immintrin.h>
#else
#define MS_LOOKUP_AVX2 0
#endif

namespace memsave {

constexpr int64_t kCodewords = 16;
constexpr int64_t kLevels = 256;

// sums[i] = the sum of the table entries of key first + i, for `count` keys. Wraps around where a table is not as above.
inline void sum_entries_plainly(const uint8_t* table, int64_t subspaces, const uint8_t* codes, int64_t keys, int64_t first,
                                int64_t count, uint8_t* sums) {
  std::memset(sums, 0, static_cast<size_t>(count));
  for (int64_t m = 0; m < subspaces; ++m) {
    const uint8_t *row = codes + m / 2 * keys + first, *entries = table + m * kCodewords;
    const int shift = m % 2 ? 4 : 0;
    for (int64_t i = 0; i < count; ++i) sums[i] = static_cast<uint8_t>(sums[i] + entries[(row[i] >> shift) & 15]);
  }
}

#if MS_LOOKUP_AVX2
__attribute__((target("avx2"))) inline void sum_entries_by_32(const uint8_t* table, int64_t subspaces,
                                                              const uint8_t* codes, int64_t keys, int64_t first,
                                                              int64_t count, uint8_t* sums) {
  const __m256i low = _mm256_set1_epi8(15);
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    __m256i sum = _mm256_setzero_si256();
    for (int64_t m = 0; m < subspaces; m += 2) {
      const uint8_t* entries = table + m * kCodewords;
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + m / 2 * keys + first + i));
      const __m256i even = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
      sum = _mm256_add_epi8(sum, _mm256_shuffle_epi8(even, _mm256_and_si256(both, low)));
      if (m + 1 == subspaces) break;
      const __m128i* next = reinterpret_cast<const __m128i*>(entries + kCodewords);
      const __m256i odd = _mm256_broadcastsi128_si256(_mm_loadu_si128(next));
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
      sum = _mm256_add_epi8(sum, _mm256_shuffle_epi8(odd, high));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + i), sum);
  }
  if (i < count) sum_entries_plainly(table, subspaces, codes, keys, first + i, count - i, sums + i);
}
#endif

// How many of n sums are at least `level`; and where those are, `limit` of them, from key `first` on: except for the first
// `passed_over` of those that are equal to it.
inline int64_t count_from_plainly(const uint8_t* sums, int64_t n, int32_t level) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += sums[i] >= level;
  return count;
}

inline int64_t take_from_plainly(const uint8_t* sums, int64_t begin, int64_t n, int32_t level, int64_t passed_over,
                                 int64_t first, int64_t limit, int32_t* out) {
  int64_t found = 0;
  for (int64_t i = begin; i < n && found < limit; ++i) {
    const int64_t equal = sums[i] == level;
    out[found] = static_cast<int32_t>(first + i);
    found += (sums[i] > level) | (equal & (passed_over <= 0));
    passed_over -= equal;
  }
  return found;
}

#if MS_LOOKUP_AVX2
__attribute__((target("avx2,popcnt"))) inline int64_t count_from_by_32(const uint8_t* sums, int64_t n, int32_t level) {
  const __m256i least = _mm256_set1_epi8(static_cast<char>(level));
  int64_t count = 0, i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m256i here = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + i));
    const __m256i at_least = _mm256_cmpeq_epi8(_mm256_max_epu8(here, least), here);
    count += __builtin_popcount(static_cast<uint32_t>(_mm256_movemask_epi8(at_least)));
  }
  return count + count_from_plainly(sums + i, n - i, level);
}

__attribute__((target("avx2,bmi"))) inline int64_t take_from_by_32(const uint8_t* sums, int64_t n, int32_t level,
                                                                   int64_t passed_over, int64_t first, int64_t limit,
                                                                   int32_t* out) {
  const __m256i least = _mm256_set1_epi8(static_cast<char>(level));
  int64_t found = 0, i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m256i here = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + i));
    uint32_t equal = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(here, least)));
    const __m256i at_least = _mm256_cmpeq_epi8(_mm256_max_epu8(here, least), here);
    uint32_t taken = static_cast<uint32_t>(_mm256_movemask_epi8(at_least));
    for (; equal != 0 && passed_over > 0; equal &= equal - 1, --passed_over) taken &= ~(equal & (~equal + 1));
    for (; taken != 0; taken &= taken - 1) out[found++] = static_cast<int32_t>(first + i + __builtin_ctz(taken));
  }
  return found + take_from_plainly(sums, i, n, level, passed_over, first, limit - found, out + found);
}
#endif

inline bool has_lookup() {
#if MS_LOOKUP_AVX2
  static const bool found = __builtin_cpu_supports("avx2");
  return found;
#else
  return false;
#endif
}

inline int64_t count_from(const uint8_t* sums, int64_t n, int32_t level) {
#if MS_LOOKUP_AVX2
  if (has_lookup()) return count_from_by_32(sums, n, level);
#endif
  return count_from_plainly(sums, n, level);
}

inline int64_t take_from(const uint8_t* sums, int64_t n, int32_t level, int64_t passed_over, int64_t first, int64_t limit,
                         int32_t* out) {
#if MS_LOOKUP_AVX2
  if (has_lookup()) return take_from_by_32(sums, n, level, passed_over, first, limit, out);
#endif
  return take_from_plainly(sums, 0, n, level, passed_over, first, limit, out);
}

inline void sum_entries(const uint8_t* table, int64_t subspaces, const uint8_t* codes, int64_t keys, int64_t first,
                        int64_t count, uint8_t* sums) {
#if MS_LOOKUP_AVX2
  if (has_lookup()) return sum_entries_by_32(table, subspaces, codes, keys, first, count, sums);
#endif
  sum_entries_plainly(table, subspaces, codes, keys, first, count, sums);
}

// Which keys a row sees: those in [first, behind) for which `mask`, if there is one, holds.
struct Visible {
  int64_t first, behind, mask_stride;
  const uint8_t* mask;

  MS_INLINE bool operator()(int64_t key) const { return mask == nullptr || mask[key * mask_stride] != 0; }
};

// A mask that broadcasts to (B, H, R, S); a null pointer stands for none.
struct Mask {
  const uint8_t* values;
  int64_t batch_stride, head_stride, row_stride, key_stride;

  MS_INLINE const uint8_t* row(int64_t b, int64_t h, int64_t r) const {
    return values == nullptr ? nullptr : values + b * batch_stride + h * head_stride + r * row_stride;
  }
};

// body(item, piece) for all items: pieces of about the same size, of which each may use scratch memory of its own.
template <class Body>
void in_pieces(int64_t items, int64_t pieces, const Body& body) {
  parallel_for(std::min(items, pieces), 1, [&](int64_t begin, int64_t end) {
    const int64_t count = std::min(items, pieces);
    for (int64_t piece = begin; piece < end; ++piece) {
      for (int64_t item = items * piece / count; item < items * (piece + 1) / count; ++item) body(item, piece);
    }
  });
}

}  // namespace memsave
