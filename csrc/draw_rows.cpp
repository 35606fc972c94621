// Systematic sampling over a random permutation, the same rows as memsave/ops/draw_rows/reference.py.
//
// N rows, k kept rows. The permutation sorts the rows by random keys. Random keys are spread evenly, so one counting pass
// on their leading bits leaves about one row in each bucket, and insertion finishes the buckets: O(N), stable.
#include "common.h"

namespace memsave {
namespace {

constexpr int64_t kGrain = 1 << 13;
constexpr int64_t kOne = int64_t{1} << 32;
constexpr int kKeyBits = 63;

int bucket_bits(int64_t n) {
  int bits = 0;
  while (bits < 30 && (int64_t{2} << bits) <= n) ++bits;
  return bits;
}

// The parts of the caller's scratch memory, the widest type first for alignment.
struct Scratch {
  int64_t* keys;      // (n,)
  uint32_t* starts;   // (buckets + 1,) where each bucket begins in `order`
  int32_t* order;     // (n,) the permutation
  uint8_t* selected;  // (n,)
};

int64_t scratch_bytes(int64_t n) { return 13 * n + 4 * ((int64_t{1} << bucket_bits(n)) + 1); }

Scratch split(void* memory, int64_t n) {
  int64_t* keys = static_cast<int64_t*>(memory);
  uint32_t* starts = reinterpret_cast<uint32_t*>(keys + n);
  int32_t* order = reinterpret_cast<int32_t*>(starts + (int64_t{1} << bucket_bits(n)) + 1);
  return {keys, starts, order, reinterpret_cast<uint8_t*>(order + n)};
}

MS_CLONES void permutation_keys(int64_t* keys, uint64_t seed, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Words words = row_words(static_cast<uint64_t>(i), kPermutationStream, seed);
    keys[i] = static_cast<int64_t>(uint64_t{words.w1 & 0x7FFFFFFFu} << 32 | words.w0);
  }
}

void sort_bucket(int32_t* order, int64_t size, const int64_t* keys) {
  for (int64_t i = 1; i < size; ++i) {
    const int32_t row = order[i];
    int64_t j = i;
    for (; j > 0 && keys[order[j - 1]] > keys[row]; --j) order[j] = order[j - 1];
    order[j] = row;
  }
}

void permute(const Scratch& scratch, int64_t n) {
  const int bits = bucket_bits(n);
  const int64_t buckets = int64_t{1} << bits;
  uint32_t* starts = scratch.starts;
  std::memset(starts, 0, static_cast<size_t>(buckets + 1) * sizeof(uint32_t));
  for (int64_t i = 0; i < n; ++i) ++starts[(scratch.keys[i] >> (kKeyBits - bits)) + 1];
  for (int64_t b = 0; b < buckets; ++b) starts[b + 1] += starts[b];
  for (int64_t i = 0; i < n; ++i) {
    scratch.order[starts[scratch.keys[i] >> (kKeyBits - bits)]++] = static_cast<int32_t>(i);
  }
  // Placing moved each start to the end of its bucket.
  for (int64_t b = 0, begin = 0; b < buckets; begin = starts[b++]) {
    sort_bucket(scratch.order + begin, starts[b] - begin, scratch.keys);
  }
}

}  // namespace
}  // namespace memsave

MS_EXPORT int64_t ms_draw_rows_scratch_bytes(int64_t n) { return memsave::scratch_bytes(n); }

// q (n,) with a stride, out (k,). Returns the number of rows found: k, or less where q sums to less than k * 2^32.
MS_EXPORT int64_t ms_draw_rows(const int64_t* q, int64_t n, int64_t stride, int64_t k, int64_t seed, void* memory,
                               int32_t* out) {
  using namespace memsave;
  const Scratch scratch = split(memory, n);
  const uint64_t key = static_cast<uint64_t>(seed);
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) { permutation_keys(scratch.keys, key, begin, end); });
  permute(scratch, n);

  int64_t end = 0, mark = row_words(0, kOffsetStream, key).w0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t row = scratch.order[i];
    end += q[row * stride];
    const bool hit = end > mark;
    scratch.selected[row] = hit;
    if (hit) mark += kOne;
  }

  int64_t found = 0;
  for (int64_t row = 0; row < n && found < k; ++row) {
    out[found] = static_cast<int32_t>(row);
    found += scratch.selected[row];
  }
  return found;
}
