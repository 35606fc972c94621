// The gradients of attention of each query to the keys in its list.
//
// Shapes as in selected_attention.cpp. For some rows at a time, first each row's probabilities and the gradients of its scores
// are made, and the gradient of its query; then each range of keys adds up, over these rows, what they give to it. So no two
// threads write to one key, a range stays in the cache, and results do not depend on the number of threads.
#include "product_quantization.h"
#include "selected_keys.h"

namespace memsave {
namespace {

constexpr int64_t kRange = 512;   // keys
constexpr int64_t kMaxRows = 256;  // that are worked on at once, of each head

struct Job {
  Rows doutput, query, key, value, output;
  Lists lists;
  int64_t group, features, value_features, groups, rows, keys;
  double scale;
  const void* logsumexp;
  void *dquery, *dkey, *dvalue;
  void* scratch;  // (rows at once of all heads, g, 2, K): probabilities, gradients of the scores
  int64_t first, behind;  // the rows that are worked on

  MS_INLINE int64_t place(int64_t b, int64_t kv, int64_t r) const {
    return ((b * groups + kv) * (behind - first) + (r - first)) * group * 2 * lists.length;
  }
};

template <class T, class Wide>
MS_INLINE void one_row(const Job& job, int64_t item) {
  const int64_t count_of_rows = job.behind - job.first;
  const int64_t b = item / count_of_rows / job.groups, kv = item / count_of_rows % job.groups;
  const int64_t r = job.first + item % count_of_rows;
  const int32_t* list = job.lists.at(b, kv, r);
  const int64_t count = job.lists.count(list);
  const T *key = job.key.at<T>(b, kv, 0), *value = job.value.at<T>(b, kv, 0);
  Wide* scratch = static_cast<Wide*>(job.scratch) + job.place(b, kv, r);
  const Wide scale = static_cast<Wide>(job.scale);
  Four<T, Wide> keys, values;
  Wide query_buffer[kMaxHead], doutput_buffer[kMaxHead], output_buffer[kMaxHead], sums[kMaxHead];
  for (int64_t h = 0; h < job.group; ++h) {
    const int64_t head = kv * job.group + h, row = (b * job.groups * job.group + head) * job.rows + r;
    const Wide* q = wide_row(job.query.at<T>(b, head, r), job.features, query_buffer);
    const Wide* dy = wide_row(job.doutput.at<T>(b, head, r), job.value_features, doutput_buffer);
    const Wide* y = wide_row(job.output.at<T>(b, head, r), job.value_features, output_buffer);
    Wide delta = 0;
    for (int64_t c = 0; c < job.value_features; ++c) delta += dy[c] * y[c];
    const Wide logsumexp = static_cast<const Wide*>(job.logsumexp)[row];
    const Wide shift = std::isfinite(logsumexp) ? logsumexp : Wide(0);
    Wide *p = scratch + h * 2 * job.lists.length, *ds = p + job.lists.length;
    std::fill(sums, sums + job.features, Wide(0));
    for (int64_t tile = 0; tile < count; tile += kTile) {
      const int64_t end = std::min(count, tile + kTile);
      for (int64_t i = tile; i < end; i += kAtOnce) {
        Wide products[2][kAtOnce];
        keys.load(key, job.key.row_stride, list + i, count - i, job.features);
        values.load(value, job.value.row_stride, list + i, count - i, job.value_features);
        four_products(q, keys.rows, job.features, products[0]);
        four_products(dy, values.rows, job.value_features, products[1]);
        for (int64_t j = 0; j < std::min(kAtOnce, end - i); ++j) p[i + j] = products[0][j], ds[i + j] = products[1][j];
      }
      for (int64_t i = tile; i < end; ++i) {
        p[i] = exponential(p[i] * scale - shift);
        ds[i] = (ds[i] - delta) * p[i] * scale;
      }
      for (int64_t i = tile; i < end; i += kAtOnce) {
        Wide factors[kAtOnce];
        for (int64_t j = 0; j < kAtOnce; ++j) factors[j] = i + j < end ? ds[i + j] : Wide(0);
        keys.load(key, job.key.row_stride, list + i, count - i, job.features);
        add_four(factors, keys.rows, job.features, sums);
      }
    }
    T* dquery = static_cast<T*>(job.dquery) + row * job.features;
    for (int64_t c = 0; c < job.features; ++c) narrow_to(sums[c], dquery[c]);
  }
}

template <class Wide>
MS_INLINE void add_row(Wide factor, const Wide* row, int64_t features, Wide* __restrict sums) {
  for (int64_t j = 0; j < features; ++j) sums[j] += factor * row[j];
}

// Which key comes next in the list of each row that is worked on, and at which place; kNone behind the range.
struct Cursors {
  int32_t next[kMaxRows];
  int64_t place[kMaxRows];
};

constexpr int32_t kNone = -1;

MS_INLINE int32_t next_key(const int32_t* list, int64_t place, int64_t count, int64_t behind) {
  return place < count && list[place] < behind ? list[place] : kNone;
}

// What the rows that are worked on give to the keys of one range. A key's part is summed before it is added to what there
// is: rounding then grows with the rows at once and the number of such parts, not with all rows.
template <class T, class Wide>
MS_INLINE void one_range(const Job& job, int64_t item) {
  const int64_t ranges = (job.keys + kRange - 1) / kRange, rows = job.behind - job.first;
  const int64_t b = item / ranges / job.groups, kv = item / ranges % job.groups, range = item % ranges;
  const int64_t low = range * kRange, high = std::min(job.keys, low + kRange);
  Wide* dkey = static_cast<Wide*>(job.dkey) + (b * job.groups + kv) * job.keys * job.features;
  Wide* dvalue = static_cast<Wide*>(job.dvalue) + (b * job.groups + kv) * job.keys * job.value_features;
  Wide query_buffer[kMaxHead], doutput_buffer[kMaxHead], key_sums[kMaxHead], value_sums[kMaxHead];
  Cursors at;
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t* list = job.lists.at(b, kv, job.first + r);
    const int64_t count = job.lists.count(list);
    at.place[r] = std::lower_bound(list, list + count, low) - list;
    at.next[r] = next_key(list, at.place[r], count, high);
  }
  for (int64_t key = low; key < high; ++key) {
    int32_t found[kMaxRows];
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      found[count] = static_cast<int32_t>(r);
      count += at.next[r] == key;
    }
    if (count == 0) continue;
    std::fill(key_sums, key_sums + job.features, Wide(0));
    std::fill(value_sums, value_sums + job.value_features, Wide(0));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = job.first + found[i], place = at.place[found[i]];
      const Wide* scratch = static_cast<const Wide*>(job.scratch) + job.place(b, kv, r) + place;
      for (int64_t h = 0; h < job.group; ++h) {
        const Wide *p = scratch + h * 2 * job.lists.length, *ds = p + job.lists.length;
        const int64_t head = kv * job.group + h;
        const Wide* q = wide_row(job.query.at<T>(b, head, r), job.features, query_buffer);
        const Wide* dy = wide_row(job.doutput.at<T>(b, head, r), job.value_features, doutput_buffer);
        add_row(*ds, q, job.features, key_sums);
        add_row(*p, dy, job.value_features, value_sums);
      }
      const int32_t* list = job.lists.at(b, kv, r);
      at.place[found[i]] = place + 1;
      at.next[found[i]] = next_key(list, place + 1, job.lists.length, high);
    }
    add_row(Wide(1), key_sums, job.features, dkey + key * job.features);
    add_row(Wide(1), value_sums, job.value_features, dvalue + key * job.value_features);
  }
}

enum class Step { kRows, kRanges };

template <class T, class Wide>
MS_INLINE void work(const Job& job, Step step, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    if (step == Step::kRows) {
      one_row<T, Wide>(job, item);
    } else {
      one_range<T, Wide>(job, item);
    }
  }
}

// A function of its own for each type, because compilers clone functions, not templates.
MS_CLONES void work_float32(const Job& job, Step step, int64_t begin, int64_t end) {
  work<float, float>(job, step, begin, end);
}
MS_CLONES void work_float64(const Job& job, Step step, int64_t begin, int64_t end) {
  work<double, double>(job, step, begin, end);
}
MS_CLONES void work_float16(const Job& job, Step step, int64_t begin, int64_t end) {
  work<Float16, float>(job, step, begin, end);
}
MS_CLONES void work_bfloat16(const Job& job, Step step, int64_t begin, int64_t end) {
  work<BFloat16, float>(job, step, begin, end);
}

void work(const Job& job, int64_t dtype, Step step, int64_t begin, int64_t end) {
  switch (dtype) {
    case kFloat32: return work_float32(job, step, begin, end);
    case kFloat64: return work_float64(job, step, begin, end);
    case kFloat16: return work_float16(job, step, begin, end);
    default: return work_bfloat16(job, step, begin, end);
  }
}

}  // namespace
}  // namespace memsave

// strides: those of batch, heads and rows, of doutput, query, key, value and output. sizes: B, kv, g, R, D, E, K, S, and how
// many rows are worked on at once. Returns -1, or the number of the first list that is none, with nothing written.
MS_EXPORT int64_t ms_selected_attention_backward(const void* doutput, const void* query, const void* key,
                                                 const void* value, const void* output, const int64_t* strides,
                                                 int64_t dtype, const int32_t* lists, const void* logsumexp,
                                                 const int64_t* sizes, double scale, void* scratch, void* dquery,
                                                 void* dkey, void* dvalue) {
  using namespace memsave;
  const auto rows_of = [&](const void* values, int i) {
    return Rows{values, strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
  };
  const int64_t batch = sizes[0], groups = sizes[1], rows = sizes[3], keys = sizes[7], at_once = sizes[8];
  Job job{rows_of(doutput, 0), rows_of(query, 1), rows_of(key, 2), rows_of(value, 3), rows_of(output, 4),
          {lists, groups, rows, sizes[6]}, sizes[2], sizes[4], sizes[5], groups, rows, keys, scale, logsumexp,
          dquery, dkey, dvalue, scratch, 0, 0};
  if (const int64_t wrong = first_wrong_list(job.lists, batch * groups * rows, keys); wrong >= 0) return wrong;
  for (job.first = 0; job.first < rows; job.first = job.behind) {
    job.behind = std::min(rows, job.first + at_once);
    parallel_for(batch * groups * (job.behind - job.first), 1,
                 [&](int64_t begin, int64_t end) { work(job, dtype, Step::kRows, begin, end); });
    parallel_for(batch * groups * ((keys + kRange - 1) / kRange), 1,
                 [&](int64_t begin, int64_t end) { work(job, dtype, Step::kRanges, begin, end); });
  }
  return -1;
}
