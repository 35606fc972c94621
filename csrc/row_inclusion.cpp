// Fixed-point inclusion probabilities q, bit-equal to memsave/ops/row_inclusion/reference.py.
//
// N rows, k kept rows, c rows capped at probability 1. Where the reference sorts to find c, this caps again and again:
// starting from none, the rows with (k - c) * m >= S (the sum of the uncapped) are capped, until none is new. No row is
// capped wrongly: the sum of the rows capped later is at least their number times any smaller m. It ends at the same c,
// because below that c the largest uncapped row always is capped.
#include <algorithm>
#include <atomic>

#include "common.h"

namespace memsave {
namespace {

constexpr int64_t kGrain = 1 << 14;
constexpr int64_t kOne = int64_t{1} << 32;
constexpr double kWeightMax = 0x1.fffffep127;  // the largest float32
constexpr double kWeightSteps = 0x1p30;
constexpr double kRoundDown = 1.0 - 0x1p-50;

MS_INLINE double to_double(float x) { return x; }
MS_INLINE double to_double(double x) { return x; }
template <class Half>
MS_INLINE double to_double(Half x) {
  return Half::widen(x.bits);
}

MS_INLINE double clean(double w) { return !(w <= kWeightMax) ? kWeightMax : (w > 0.0 ? w : 0.0); }

// Non-negative doubles have the order of their bits, and an integer maximum vectorizes.
template <class T>
MS_INLINE int64_t largest_bits(const T* weights, int64_t stride, int64_t begin, int64_t end) {
  int64_t largest = 0;
  for (int64_t i = begin; i < end; ++i) {
    largest = std::max(largest, bit_cast<int64_t>(clean(to_double(weights[i * stride]))));
  }
  return largest;
}

template <class T>
MS_INLINE int64_t quantize(const T* weights, int64_t stride, double largest, int64_t* m, int64_t begin, int64_t end) {
  int64_t sum = 0;
  for (int64_t i = begin; i < end; ++i) {
    const double share = clean(to_double(weights[i * stride])) / largest * kWeightSteps;
    m[i] = 1 + static_cast<int32_t>(share);
    sum += m[i];
  }
  return sum;
}

// A function of its own for each type, because compilers clone functions, not templates.
#define MS_FOR_TYPE(T, name)                                                                                     \
  MS_CLONES int64_t largest_bits_##name(const void* weights, int64_t stride, int64_t begin, int64_t end) {       \
    return largest_bits(static_cast<const T*>(weights), stride, begin, end);                                     \
  }                                                                                                              \
  MS_CLONES int64_t quantize_##name(const void* weights, int64_t stride, double largest, int64_t* m,             \
                                    int64_t begin, int64_t end) {                                                \
    return quantize(static_cast<const T*>(weights), stride, largest, m, begin, end);                             \
  }
MS_FOR_TYPE(float, float32)
MS_FOR_TYPE(double, float64)
MS_FOR_TYPE(Float16, float16)
MS_FOR_TYPE(BFloat16, bfloat16)
#undef MS_FOR_TYPE

using LargestBits = int64_t (*)(const void*, int64_t, int64_t, int64_t);
using Quantize = int64_t (*)(const void*, int64_t, double, int64_t*, int64_t, int64_t);
const LargestBits kLargestBits[] = {largest_bits_float32, largest_bits_float64, largest_bits_float16,
                                    largest_bits_bfloat16};
const Quantize kQuantize[] = {quantize_float32, quantize_float64, quantize_float16, quantize_bfloat16};

struct Uncapped {
  int64_t count, sum;
};

// The rows with slots * m < bound: their number and the sum of their m.
MS_CLONES Uncapped below(const int64_t* m, int64_t slots, int64_t bound, int64_t begin, int64_t end) {
  int64_t count = 0, sum = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t keep = slots * m[i] < bound ? -1 : 0;  // a mask of all ones
    count -= keep;
    sum += m[i] & keep;
  }
  return {count, sum};
}

// q in place of m; returns its sum.
MS_CLONES int64_t scale_to_budget(int64_t* m, int64_t slots, int64_t bound, double ratio, int64_t begin, int64_t end) {
  int64_t sum = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t share = std::min(kOne, 1 + static_cast<int64_t>(static_cast<double>(m[i]) * ratio));
    m[i] = slots * m[i] < bound ? share : kOne;
    sum += m[i];
  }
  return sum;
}

double largest_weight(const void* weights, int64_t dtype, int64_t n, int64_t stride) {
  std::atomic<int64_t> bits{0};
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    const int64_t found = kLargestBits[dtype](weights, stride, begin, end);
    int64_t seen = bits.load();
    while (seen < found && !bits.compare_exchange_weak(seen, found)) {
    }
  });
  const double largest = bit_cast<double>(bits.load());
  return largest > 0.0 ? largest : 1.0;
}

}  // namespace
}  // namespace memsave

// weights (n,) with a stride, 1 <= k < n, q (n,) contiguous.
MS_EXPORT int64_t ms_row_inclusion(const void* weights, int64_t dtype, int64_t n, int64_t stride, int64_t k,
                                   int64_t* q) {
  using namespace memsave;
  const double largest = largest_weight(weights, dtype, n, stride);
  std::atomic<int64_t> total{0};
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    total += kQuantize[dtype](weights, stride, largest, q, begin, end);
  });

  Uncapped uncapped{n, total};
  for (;;) {
    const int64_t slots = k - (n - uncapped.count), bound = uncapped.sum;
    std::atomic<int64_t> count{0}, sum{0};
    parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
      const Uncapped part = below(q, slots, bound, begin, end);
      count += part.count;
      sum += part.sum;
    });
    if (count == uncapped.count) break;
    uncapped = {count, sum};
  }

  const int64_t slots = k - (n - uncapped.count);
  const double ratio = static_cast<double>(slots * kOne - uncapped.count) / static_cast<double>(uncapped.sum) * kRoundDown;
  std::atomic<int64_t> given{0};
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    given += scale_to_budget(q, slots, uncapped.sum, ratio, begin, end);
  });

  int64_t remainder = k * kOne - given;
  for (int64_t i = 0; i < n && remainder > 0; ++i) {
    const int64_t added = std::min(remainder, kOne - q[i]);
    q[i] += added;
    remainder -= added;
  }
  return 0;
}
