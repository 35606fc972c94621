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
  int64_t group, features, value_features, groups, rows, keys;
  double scale;
  void *output, *logsumexp, *scratch;  // scratch: (pieces, rows of a tile, g, K + E)
};

constexpr int64_t kLanes = 16, kTileRows = 16, kRange = 256;  // kRange: keys

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

// Some rows of one key/value head. Ranges of keys come one after the other, all rows of the tile in each, so that a range is
// read from the cache.
template <class T, class Wide>
struct Tile {
  const Job& job;
  int64_t b, kv, first, rows;
  Wide* scratch;
  int64_t counts[kTileRows], places[kTileRows];

  MS_INLINE Wide* scores(int64_t r, int64_t h) const { return scratch + (r * job.group + h) * job.lists.length; }
  MS_INLINE const int32_t* list(int64_t r) const { return job.lists.at(b, kv, first + r); }
  MS_INLINE int64_t place(int64_t r, int64_t h) const {
    return ((b * job.groups + kv) * job.group + h) * job.rows + first + r;
  }

  // The end of row r's part of a range of keys that begins at its place.
  MS_INLINE int64_t range_end(int64_t r, int64_t behind) const {
    const int32_t* keys = list(r);
    int64_t end = places[r];
    while (end < counts[r] && keys[end] < behind) ++end;
    return end;
  }

  // One range: body(row, begin, end) for each row's part of it.
  template <class Body>
  MS_INLINE void each_range(const Body& body) {
    std::fill(places, places + rows, 0);
    for (int64_t behind = kRange; behind < job.keys + kRange; behind += kRange) {
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t end = range_end(r, behind);
        if (places[r] < end) body(r, places[r], end);
        places[r] = end;
      }
    }
  }

  MS_INLINE void make_scores() {
    const T* key = job.key.at<T>(b, kv, 0);
    Four<T, Wide> four;
    Wide query[kMaxHead], products[kAtOnce];
    each_range([&](int64_t r, int64_t begin, int64_t end) MS_INLINE_LAMBDA {
      for (int64_t i = begin; i < end; i += kAtOnce) {
        four.load(key, job.key.row_stride, list(r) + i, end - i, job.features);
        for (int64_t h = 0; h < job.group; ++h) {
          const Wide* q = wide_row(job.query.at<T>(b, kv * job.group + h, first + r), job.features, query);
          four_products(q, four.rows, job.features, products);
          for (int64_t j = 0; j < std::min(kAtOnce, end - i); ++j) {
            scores(r, h)[i + j] = products[j] * static_cast<Wide>(job.scale);
          }
        }
      }
    });
  }

  MS_INLINE void normalize() {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t h = 0; h < job.group; ++h) {
        Wide peak = 0, total = 0;
        softmax_row(scores(r, h), counts[r], &peak, &total);
        for (int64_t i = 0; i < counts[r]; ++i) scores(r, h)[i] /= total;
        const Wide logsumexp = counts[r] ? peak + std::log(total) : -static_cast<Wide>(HUGE_VAL);
        static_cast<Wide*>(job.logsumexp)[place(r, h)] = logsumexp;
      }
    }
  }

  MS_INLINE void add_values() {
    const T* value = job.value.at<T>(b, kv, 0);
    Wide* sums = scratch + kTileRows * job.group * job.lists.length;
    const int64_t width = job.value_features;
    std::fill(sums, sums + rows * job.group * width, Wide(0));
    Four<T, Wide> four;
    each_range([&](int64_t r, int64_t begin, int64_t end) MS_INLINE_LAMBDA {
      for (int64_t i = begin; i < end; i += kAtOnce) {
        four.load(value, job.value.row_stride, list(r) + i, end - i, width);
        for (int64_t h = 0; h < job.group; ++h) {
          Wide weights[kAtOnce];
          for (int64_t j = 0; j < kAtOnce; ++j) weights[j] = i + j < end ? scores(r, h)[i + j] : Wide(0);
          add_four(weights, four.rows, width, sums + (r * job.group + h) * width);
        }
      }
    });
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t h = 0; h < job.group; ++h) {
        T* output = static_cast<T*>(job.output) + place(r, h) * width;
        for (int64_t c = 0; c < width; ++c) narrow_to(sums[(r * job.group + h) * width + c], output[c]);
      }
    }
  }
};

template <class T, class Wide>
MS_INLINE void one_tile(const Job& job, int64_t item, int64_t piece) {
  const int64_t tiles = (job.rows + kTileRows - 1) / kTileRows, first = item % tiles * kTileRows;
  Wide* scratch = static_cast<Wide*>(job.scratch) + piece * kTileRows * job.group * (job.lists.length + job.value_features);
  Tile<T, Wide> tile{job, item / tiles / job.groups, item / tiles % job.groups, first,
                     std::min(kTileRows, job.rows - first), scratch, {}, {}};
  for (int64_t r = 0; r < tile.rows; ++r) tile.counts[r] = job.lists.count(tile.list(r));
  tile.make_scores();
  tile.normalize();
  tile.add_values();
}

// A function of its own for each type, because compilers clone functions, not templates.
MS_CLONES void tile_float32(const Job& job, int64_t item, int64_t piece) { one_tile<float, float>(job, item, piece); }
MS_CLONES void tile_float64(const Job& job, int64_t item, int64_t piece) { one_tile<double, double>(job, item, piece); }
MS_CLONES void tile_float16(const Job& job, int64_t item, int64_t piece) { one_tile<Float16, float>(job, item, piece); }
MS_CLONES void tile_bfloat16(const Job& job, int64_t item, int64_t piece) { one_tile<BFloat16, float>(job, item, piece); }

}  // namespace
}  // namespace memsave

// strides: those of batch, heads and rows, of query, key and value. sizes: B, kv, g, R, D, E, K, S. Returns -1, or the number of
// the first list that is none, with nothing written.
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
                rows,              sizes[7],        scale,             output,
                logsumexp,         scratch};
  if (const int64_t wrong = first_wrong_list(job.lists, sizes[0] * groups * rows, job.keys); wrong >= 0) return wrong;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  in_pieces(sizes[0] * groups * tiles, pieces, [&](int64_t item, int64_t piece) {
    switch (dtype) {
      case kFloat32: return tile_float32(job, item, piece);
      case kFloat64: return tile_float64(job, item, piece);
      case kFloat16: return tile_float16(job, item, piece);
      default: return tile_bfloat16(job, item, piece);
    }
  });
  return -1;
}
