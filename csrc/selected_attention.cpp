// Attention of each query to the keys in its list: softmax(scale * q k^T) v, and the logarithm of the sum.
//
// query (B, h, R, D), key (B, kv, S, D), value (B, kv, S, E), lists (B, kv, R, K), output (B, h, R, E). The g query heads of
// a key/value head share a list, and each key and value is read once for all of them.
#include "product_quantization.h"
#include "selected_keys.h"

namespace memsave {
namespace {

struct Job {
  Rows query, key, value;
  Lists lists;
  int64_t group, features, value_features, groups, rows;
  double scale;
  void *output, *logsumexp, *scratch;  // scratch: (pieces, g, K)
};

constexpr int64_t kLanes = 16;

// scores -> their exponentials over the largest one; returns {largest, sum}.
template <class Wide>
MS_INLINE void softmax_row(Wide* scores, int64_t count, Wide* peak, Wide* total) {
  Wide most = -static_cast<Wide>(HUGE_VAL), lanes[kLanes] = {}, sum = 0;
  for (int64_t i = 0; i < count; ++i) most = scores[i] > most ? scores[i] : most;
  const Wide shift = std::isfinite(most) ? most : Wide(0);
  for (int64_t i = 0; i < count; ++i) scores[i] = exponential(scores[i] - shift);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += scores[i + j];
  }
  for (; i < count; ++i) sum += scores[i];
  for (int64_t j = 0; j < kLanes; ++j) sum += lanes[j];
  *peak = shift, *total = sum;
}

template <class T, class Wide>
MS_INLINE void one_row(const Job& job, int64_t item, int64_t piece) {
  const int64_t b = item / job.rows / job.groups, kv = item / job.rows % job.groups, r = item % job.rows;
  const int32_t* list = job.lists.at(b, kv, r);
  const int64_t count = job.lists.count(list);
  const T *key = job.key.at<T>(b, kv, 0), *value = job.value.at<T>(b, kv, 0);
  Wide* scores = static_cast<Wide*>(job.scratch) + piece * job.group * job.lists.length;
  Four<T, Wide> four;
  Wide query[kMaxHead], sums[kMaxHead], products[kAtOnce];
  for (int64_t i = 0; i < count; i += kAtOnce) {
    four.load(key, job.key.row_stride, list + i, count - i, job.features);
    for (int64_t j = i + 2 * kAtOnce; j < std::min(count, i + 3 * kAtOnce); ++j) {
      const T* later = key + list[j] * job.key.row_stride;
      for (int64_t c = 0; c < job.features; c += 64 / int64_t{sizeof(T)}) MS_PREFETCH(later + c);
    }
    for (int64_t h = 0; h < job.group; ++h) {
      const Wide* q = wide_row(job.query.at<T>(b, kv * job.group + h, r), job.features, query);
      four_products(q, four.rows, job.features, products);
      for (int64_t j = 0; j < std::min(kAtOnce, count - i); ++j) {
        scores[h * job.lists.length + i + j] = products[j] * static_cast<Wide>(job.scale);
      }
    }
  }
  for (int64_t h = 0; h < job.group; ++h) {
    const int64_t place = (b * job.groups * job.group + kv * job.group + h) * job.rows + r;
    Wide *weights = scores + h * job.lists.length, peak = 0, total = 0;
    softmax_row(weights, count, &peak, &total);
    std::fill(sums, sums + job.value_features, Wide(0));
    for (int64_t i = 0; i < count; i += kAtOnce) {
      four.load(value, job.value.row_stride, list + i, count - i, job.value_features);
      for (int64_t j = 0; j < kAtOnce; ++j) products[j] = i + j < count ? weights[i + j] : Wide(0);
      add_four(products, four.rows, job.value_features, sums);
    }
    T* output = static_cast<T*>(job.output) + place * job.value_features;
    for (int64_t c = 0; c < job.value_features; ++c) narrow_to(count ? sums[c] / total : Wide(0), output[c]);
    static_cast<Wide*>(job.logsumexp)[place] = count ? peak + std::log(total) : -static_cast<Wide>(HUGE_VAL);
  }
}

// A function of its own for each type, because compilers clone functions, not templates.
MS_CLONES void row_float32(const Job& job, int64_t item, int64_t piece) { one_row<float, float>(job, item, piece); }
MS_CLONES void row_float64(const Job& job, int64_t item, int64_t piece) { one_row<double, double>(job, item, piece); }
MS_CLONES void row_float16(const Job& job, int64_t item, int64_t piece) { one_row<Float16, float>(job, item, piece); }
MS_CLONES void row_bfloat16(const Job& job, int64_t item, int64_t piece) { one_row<BFloat16, float>(job, item, piece); }

}  // namespace
}  // namespace memsave

// strides: those of batch, heads and rows, of query, key and value. sizes: B, kv, g, R, D, E, K.
MS_EXPORT int64_t ms_selected_attention(const void* query, const void* key, const void* value, const int64_t* strides,
                                        int64_t dtype, const int32_t* lists, const int64_t* sizes, double scale,
                                        int64_t pieces, void* scratch, void* output, void* logsumexp) {
  using namespace memsave;
  const auto rows_of = [&](const void* values, int i) {
    return Rows{values, strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
  };
  const int64_t groups = sizes[1], rows = sizes[3];
  const Job job{rows_of(query, 0), rows_of(key, 1), rows_of(value, 2), {lists, groups, rows, sizes[6]},
                sizes[2],          sizes[4],        sizes[5],          groups,
                rows,              scale,           output,            logsumexp,
                scratch};
  in_pieces(sizes[0] * groups * rows, pieces, [&](int64_t item, int64_t piece) {
    switch (dtype) {
      case kFloat32: return row_float32(job, item, piece);
      case kFloat64: return row_float64(job, item, piece);
      case kFloat16: return row_float16(job, item, piece);
      default: return row_bfloat16(job, item, piece);
    }
  });
  return 0;
}
