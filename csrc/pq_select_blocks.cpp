// For each block of queries, the key blocks with the largest shares of its representatives' estimated attention.
//
// table (B, H, N, r, M, 16), weights (B, H, N, r, 256), codes (B, H, P, S) in L blocks, out (B, H, N, K) filled up with -1.
// All is done on integers, so every implementation gives the same blocks.
#include "product_quantization.h"

namespace memsave {
namespace {

constexpr int64_t kShareBits = 16, kAlways = int64_t{1} << 62, kStretch = 256;

struct Job {
  const uint8_t *table, *codes;
  const int32_t* weights;
  Mask mask;
  int64_t heads, blocks, representatives, subspaces, keys, is_causal, window, position, size, keep, local;
  int64_t* scratch;  // (pieces, 2, L)
  int32_t* out;
};

// sums[l] = the weights of the visible keys of block l; returns their total.
MS_INLINE int64_t add_weights(const Job& job, const uint8_t* table, const int32_t* weights, const uint8_t* codes,
                              const Visible& seen, int64_t* sums) {
  uint8_t levels[kStretch];
  int64_t total = 0;
  for (int64_t key = seen.first; key < seen.behind;) {
    const int64_t block = key / job.size;
    const int64_t count = std::min({(block + 1) * job.size - key, seen.behind - key, kStretch});
    sum_entries(table, job.subspaces, codes, job.keys, key, count, levels);
    int64_t sum = 0;
    if (seen.mask == nullptr) {
      for (int64_t i = 0; i < count; ++i) sum += weights[levels[i]];
    } else {
      for (int64_t i = 0; i < count; ++i) sum += seen(key + i) ? weights[levels[i]] : 0;
    }
    sums[block] += sum;
    total += sum;
    key += count;
  }
  return total;
}

MS_INLINE bool any_visible(const Job& job, const Visible& seen, int64_t block) {
  const int64_t behind = std::min(seen.behind, (block + 1) * job.size);
  for (int64_t key = std::max(seen.first, block * job.size); key < behind; ++key) {
    if (seen(key)) return true;
  }
  return false;
}

MS_CLONES void one_block(const Job& job, int64_t item, int64_t piece) {
  const int64_t b = item / job.blocks / job.heads, h = item / job.blocks % job.heads, n = item % job.blocks;
  const int64_t own = job.position + n * job.size, last = own + job.size - 1;
  const int64_t count = (job.keys + job.size - 1) / job.size;
  Visible seen{0, job.keys, job.mask.key_stride, job.mask.row(b, h, n)};
  if (job.is_causal) seen.behind = std::clamp<int64_t>(own + 1, 0, job.keys);
  if (job.window) seen.first = std::clamp<int64_t>(own - job.window + 1, 0, job.keys);
  seen.first = std::min(seen.first, seen.behind);
  int64_t *shares = job.scratch + piece * 2 * count, *sums = shares + count;
  std::fill(shares, shares + count, 0);
  const uint8_t* codes = job.codes + (b * job.heads + h) * ((job.subspaces + 1) / 2) * job.keys;
  for (int64_t i = item * job.representatives; i < (item + 1) * job.representatives; ++i) {
    std::fill(sums, sums + count, 0);
    const uint8_t* table = job.table + i * job.subspaces * kCodewords;
    const int64_t total = add_weights(job, table, job.weights + i * kLevels, codes, seen, sums);
    const int64_t divisor = std::max<int64_t>(total, 1);
    for (int64_t l = seen.first / job.size; l * job.size < seen.behind; ++l) {
      shares[l] += static_cast<int64_t>((static_cast<uint64_t>(sums[l]) << kShareBits) / static_cast<uint64_t>(divisor));
    }
  }
  // Floor division: own may be negative.
  const auto block_of = [&](int64_t key) { return key >= 0 ? key / job.size : -((-key + job.size - 1) / job.size); };
  for (int64_t l = 0; l < count; ++l) {
    const bool stand_in = job.local && l >= block_of(own) && l <= block_of(last);
    const bool counts = any_visible(job, seen, l);
    shares[l] = stand_in || (l == 0 && counts) ? kAlways : counts ? shares[l] : -1;
  }
  int32_t* out = job.out + item * job.keep;
  int64_t found = 0;
  for (; found < std::min(job.keep, count); ++found) {
    int64_t best = 0;
    for (int64_t l = 1; l < count; ++l) best = shares[l] >= shares[best] ? l : best;
    if (shares[best] < 0) break;
    out[found] = static_cast<int32_t>(best);
    shares[best] = -1;
  }
  std::sort(out, out + found);
  std::fill(out + found, out + job.keep, -1);
}

}  // namespace
}  // namespace memsave

MS_EXPORT int64_t ms_pq_select_blocks(const uint8_t* table, const int32_t* weights, const uint8_t* codes,
                                      const uint8_t* mask, int64_t mask_batch_stride, int64_t mask_head_stride,
                                      int64_t mask_row_stride, int64_t mask_key_stride, int64_t batch, int64_t heads,
                                      int64_t blocks, int64_t representatives, int64_t subspaces, int64_t keys,
                                      int64_t is_causal, int64_t window, int64_t position, int64_t block_size,
                                      int64_t keep, int64_t local, int64_t pieces, int64_t* scratch, int32_t* out) {
  using namespace memsave;
  const Job job{table,     codes,  weights,  {mask, mask_batch_stride, mask_head_stride, mask_row_stride, mask_key_stride},
                heads,     blocks, representatives, subspaces, keys, is_causal, window, position, block_size, keep, local,
                scratch,   out};
  in_pieces(batch * heads * blocks, pieces, [&](int64_t item, int64_t piece) { one_block(job, item, piece); });
  return 0;
}
