// For each row, the keys with the largest sums of table entries, in ascending order; of equal ones the later keys.
//
// table (B, H, R, M, 16), codes (B, H, P, S), out (B, H, R, K) filled up with -1. A row's sums are bytes: counting them
// finds the sum from which on keys are taken, without sorting.
#include "product_quantization.h"

namespace memsave {
namespace {

struct Job {
  const uint8_t *table, *codes;
  Mask mask;
  int64_t heads, rows, subspaces, keys, is_causal, window, position, keep;
  uint8_t* scratch;  // (pieces, S)
  int32_t* out;
};

// The least sum that is taken, and how many keys with that very sum are passed over, the earlier ones.
struct Threshold {
  int32_t sum;
  int64_t passed_over;
};

// The keys of a row without mask: the largest sum that enough keys reach, by halving.
Threshold threshold_of_all(const uint8_t* sums, int64_t count, int64_t keep) {
  int32_t sum = 0;
  for (int32_t bit = kLevels / 2; bit > 0; bit /= 2) {
    if (count_from(sums, count, sum + bit) >= keep) sum += bit;
  }
  return {sum, count_from(sums, count, sum) - keep};
}

MS_INLINE Threshold threshold(const uint8_t* sums, const Visible& seen, int64_t keep) {
  int64_t counts[kLevels] = {};
  for (int64_t key = seen.first; key < seen.behind; ++key) counts[sums[key - seen.first]] += seen(key);
  int64_t taken = 0;
  for (int32_t sum = kLevels - 1; sum >= 0; --sum) {
    if (taken + counts[sum] >= keep) return {sum, taken + counts[sum] - keep};
    taken += counts[sum];
  }
  return {0, 0};
}

MS_INLINE int64_t take(const uint8_t* sums, const Visible& seen, Threshold from, int64_t keep, int32_t* out) {
  int64_t found = 0;
  for (int64_t key = seen.first; key < seen.behind && found < keep; ++key) {
    if (!seen(key)) continue;
    const int32_t sum = sums[key - seen.first];
    const bool equal = sum == from.sum;
    out[found] = static_cast<int32_t>(key);
    found += sum > from.sum || (equal && from.passed_over <= 0);
    from.passed_over -= equal;
  }
  return found;
}

void one_row(const Job& job, int64_t item, int64_t piece) {
  const int64_t b = item / job.rows / job.heads, h = item / job.rows % job.heads, r = item % job.rows;
  const int64_t own = job.position + r;
  Visible seen{0, job.keys, job.mask.key_stride, job.mask.row(b, h, r)};
  if (job.is_causal) seen.behind = std::clamp<int64_t>(own + 1, 0, job.keys);
  if (job.window) seen.first = std::clamp<int64_t>(own - job.window + 1, 0, job.keys);
  seen.first = std::min(seen.first, seen.behind);
  int32_t* out = job.out + item * job.keep;
  int64_t found = 0;
  if (seen.behind - seen.first <= job.keep) {
    for (int64_t key = seen.first; key < seen.behind; ++key) {
      if (seen(key)) out[found++] = static_cast<int32_t>(key);
    }
  } else {
    uint8_t* sums = job.scratch + piece * job.keys;
    const int64_t rows = (job.subspaces + 1) / 2;
    sum_entries(job.table + item * job.subspaces * kCodewords, job.subspaces,
                job.codes + (b * job.heads + h) * rows * job.keys, job.keys, seen.first, seen.behind - seen.first, sums);
    if (seen.mask != nullptr) {
      found = take(sums, seen, threshold(sums, seen, job.keep), job.keep, out);
    } else {
      const int64_t count = seen.behind - seen.first;
      const Threshold from = threshold_of_all(sums, count, job.keep);
      found = take_from(sums, count, from.sum, from.passed_over, seen.first, job.keep, out);
    }
  }
  std::fill(out + found, out + job.keep, -1);
}

}  // namespace
}  // namespace memsave

MS_EXPORT int64_t ms_pq_select(const uint8_t* table, const uint8_t* codes, const uint8_t* mask, int64_t mask_batch_stride,
                               int64_t mask_head_stride, int64_t mask_row_stride, int64_t mask_key_stride, int64_t batch,
                               int64_t heads, int64_t rows, int64_t subspaces, int64_t keys, int64_t is_causal,
                               int64_t window, int64_t position, int64_t keep, int64_t pieces, uint8_t* scratch,
                               int32_t* out) {
  using namespace memsave;
  const Job job{table,     codes,    {mask, mask_batch_stride, mask_head_stride, mask_row_stride, mask_key_stride},
                heads,     rows,     subspaces, keys, is_causal, window, position, keep, scratch, out};
  in_pieces(batch * heads * rows, pieces, [&](int64_t item, int64_t piece) { one_row(job, item, piece); });
  return 0;
}
