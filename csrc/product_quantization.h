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

inline void sum_entries(const uint8_t* table, int64_t subspaces, const uint8_t* codes, int64_t keys, int64_t first,
                        int64_t count, uint8_t* sums) {
#if MS_LOOKUP_AVX2
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  if (has_avx2) return sum_entries_by_32(table, subspaces, codes, keys, first, count, sums);
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
