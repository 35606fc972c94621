// The products of each query with all codewords, as integers that add up to 255 at most.
//
// query (B, H, R, D = M d) with any strides; codewords (H, M, d, 16), where codeword 0 stands for those that are missing;
// table (B, H, R, M, 16), step (B, H, R).
#include "product_quantization.h"
#include "token_tiles.h"

namespace memsave {
namespace {

constexpr int64_t kMaxSubspaces = 64, kGrainProducts = 1 << 16;
constexpr float kLargest = 255.0f, kTiny = 1e-30f;

struct Job {
  const void* query;
  int64_t heads, rows, subspaces, features;
  int64_t batch_stride, head_stride, row_stride, feature_stride;
  const float* codewords;
  uint8_t* table;
  float* step;
};

template <class T>
MS_INLINE void one_row(const Job& job, int64_t b, int64_t h, int64_t r) {
  const T* query = static_cast<const T*>(job.query) + b * job.batch_stride + h * job.head_stride + r * job.row_stride;
  const int64_t place = (b * job.heads + h) * job.rows + r;
  float products[kMaxSubspaces][kCodewords], low[kMaxSubspaces], total = 0.0f;
  for (int64_t m = 0; m < job.subspaces; ++m) {
    const float* codewords = job.codewords + (h * job.subspaces + m) * job.features * kCodewords;
    float sums[kCodewords] = {};
    for (int64_t j = 0; j < job.features; ++j) {
      const float x = static_cast<float>(widened(query[(m * job.features + j) * job.feature_stride]));
      for (int64_t c = 0; c < kCodewords; ++c) sums[c] += x * codewords[j * kCodewords + c];
    }
    float least = sums[0], most = sums[0];
    for (int64_t c = 0; c < kCodewords; ++c) {
      products[m][c] = sums[c];
      least = std::min(least, sums[c]), most = std::max(most, sums[c]);
    }
    low[m] = least;
    total += most - least;
  }
  const float factor = kLargest / std::max(total, kTiny);
  uint8_t* table = job.table + place * job.subspaces * kCodewords;
  for (int64_t m = 0; m < job.subspaces; ++m) {
    for (int64_t c = 0; c < kCodewords; ++c) {
      const float level = std::min((products[m][c] - low[m]) * factor, kLargest);
      table[m * kCodewords + c] = level >= 0.0f ? static_cast<uint8_t>(static_cast<int32_t>(level)) : 0;  // 0 of NaN
    }
  }
  job.step[place] = total / kLargest;
}

template <class T>
MS_INLINE void rows(const Job& job, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) one_row<T>(job, i / job.rows / job.heads, i / job.rows % job.heads, i % job.rows);
}

// A function of its own for each type, because compilers clone functions, not templates.
MS_CLONES void rows_float32(const Job& job, int64_t begin, int64_t end) { rows<float>(job, begin, end); }
MS_CLONES void rows_float64(const Job& job, int64_t begin, int64_t end) { rows<double>(job, begin, end); }
MS_CLONES void rows_float16(const Job& job, int64_t begin, int64_t end) { rows<Float16>(job, begin, end); }
MS_CLONES void rows_bfloat16(const Job& job, int64_t begin, int64_t end) { rows<BFloat16>(job, begin, end); }

}  // namespace
}  // namespace memsave

MS_EXPORT int64_t ms_pq_table(const void* query, int64_t batch_stride, int64_t head_stride, int64_t row_stride,
                              int64_t feature_stride, int64_t dtype, int64_t batch, int64_t heads, int64_t rows,
                              int64_t subspaces, int64_t features, const float* codewords, uint8_t* table, float* step) {
  using namespace memsave;
  const Job job{query,      heads,          rows,      subspaces, features, batch_stride, head_stride, row_stride,
                feature_stride, codewords, table,     step};
  parallel_for(batch * heads * rows, std::max<int64_t>(1, kGrainProducts / (subspaces * features * kCodewords)),
               [&](int64_t begin, int64_t end) {
                 switch (dtype) {
                   case kFloat32: return rows_float32(job, begin, end);
                   case kFloat64: return rows_float64(job, begin, end);
                   case kFloat16: return rows_float16(job, begin, end);
                   default: return rows_bfloat16(job, begin, end);
                 }
               });
  return 0;
}
