// The nearest codeword of each subspace, for each key: four bits of code.
//
// x (B, H, S, D = M d) with any strides; codewords (H, M, d, 16) and half their squared lengths (H, M, 16), where codeword
// 0 stands for those that are missing; codes (B, H, ceil(M / 2), S). Keys go in groups of kKeys, turned over, so that all of
// a group's keys are compared with a codeword at once.
#include <cmath>

#include "product_quantization.h"
#include "token_tiles.h"

namespace memsave {
namespace {

constexpr int64_t kKeys = 32, kMaxFeatures = 128, kGrainProducts = 1 << 16;

struct Job {
  const void* x;
  int64_t heads, keys, subspaces, features;
  int64_t batch_stride, head_stride, key_stride, feature_stride;
  const float *codewords, *halves;
  uint8_t* codes;
};

// codes[i] of one subspace for `count` keys, whose features are turned over.
MS_INLINE void nearest(const float* turned, const float* codewords, const float* halves, int64_t features,
                       uint32_t* codes) {
  float best[kKeys];
  for (int64_t i = 0; i < kKeys; ++i) best[i] = -HUGE_VALF, codes[i] = 0;
  for (int64_t c = 0; c < kCodewords; ++c) {
    float score[kKeys] = {};
    for (int64_t j = 0; j < features; ++j) {
      const float codeword = codewords[j * kCodewords + c];
      for (int64_t i = 0; i < kKeys; ++i) score[i] += turned[j * kKeys + i] * codeword;
    }
    for (int64_t i = 0; i < kKeys; ++i) {
      const float s = score[i] - halves[c];
      const bool better = s > best[i];
      codes[i] = better ? static_cast<uint32_t>(c) : codes[i];
      best[i] = better ? s : best[i];
    }
  }
}

template <class T>
MS_INLINE void encode(const Job& job, int64_t b, int64_t h, int64_t group) {
  const int64_t first = group * kKeys, count = std::min(kKeys, job.keys - first);
  const T* x = static_cast<const T*>(job.x) + b * job.batch_stride + h * job.head_stride + first * job.key_stride;
  const int64_t rows = (job.subspaces + 1) / 2;
  uint8_t* out = job.codes + (b * job.heads + h) * rows * job.keys + first;
  float turned[kMaxFeatures * kKeys] = {};
  uint32_t codes[kKeys];
  for (int64_t m = 0; m < job.subspaces; ++m) {
    const T* part = x + m * job.features * job.feature_stride;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < job.features; ++j) {
        turned[j * kKeys + i] = static_cast<float>(widened(part[i * job.key_stride + j * job.feature_stride]));
      }
    }
    const int64_t place = h * job.subspaces + m;
    nearest(turned, job.codewords + place * job.features * kCodewords, job.halves + place * kCodewords, job.features,
            codes);
    uint8_t* row = out + m / 2 * job.keys;
    for (int64_t i = 0; i < count; ++i) {
      row[i] = static_cast<uint8_t>(m % 2 ? row[i] | codes[i] << 4 : codes[i]);
    }
  }
}

// A function of its own for each type, because compilers clone functions, not templates.
MS_CLONES void encode_float32(const Job& job, int64_t b, int64_t h, int64_t group) { encode<float>(job, b, h, group); }
MS_CLONES void encode_float64(const Job& job, int64_t b, int64_t h, int64_t group) { encode<double>(job, b, h, group); }
MS_CLONES void encode_float16(const Job& job, int64_t b, int64_t h, int64_t group) { encode<Float16>(job, b, h, group); }
MS_CLONES void encode_bfloat16(const Job& job, int64_t b, int64_t h, int64_t group) {
  encode<BFloat16>(job, b, h, group);
}

}  // namespace
}  // namespace memsave

MS_EXPORT int64_t ms_pq_encode(const void* x, int64_t batch_stride, int64_t head_stride, int64_t key_stride,
                               int64_t feature_stride, int64_t dtype, int64_t batch, int64_t heads, int64_t keys,
                               int64_t subspaces, int64_t features, const float* codewords, const float* halves,
                               uint8_t* codes) {
  using namespace memsave;
  const Job job{x,          heads,     keys,     subspaces, features, batch_stride, head_stride, key_stride, feature_stride,
                codewords, halves, codes};
  const int64_t groups = (keys + kKeys - 1) / kKeys;
  const int64_t products = kKeys * subspaces * features * kCodewords;
  parallel_for(batch * heads * groups, std::max<int64_t>(1, kGrainProducts / products),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t b = i / groups / heads, h = i / groups % heads, group = i % groups;
                   switch (dtype) {
                     case kFloat32: encode_float32(job, b, h, group); break;
                     case kFloat64: encode_float64(job, b, h, group); break;
                     case kFloat16: encode_float16(job, b, h, group); break;
                     default: encode_bfloat16(job, b, h, group);
                   }
                 }
               });
  return 0;
}
