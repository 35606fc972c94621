// Shared by the kernels: exported C functions on raw pointers, threads, CPU dispatch, number formats, Philox.
//
// No torch header is included and no torch library is linked, so that one binary serves every version of torch. Nothing
// here allocates or throws: results and scratch memory are tensors of the caller.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(_WIN32)
#define MS_EXPORT extern "C" __declspec(dllexport)
#else
#define MS_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// MS_INLINE_LAMBDA stands between the parameters and the body of a lambda that a MS_CLONES function calls: it would be
// compiled for the baseline otherwise.
#if defined(__GNUC__)
#define MS_INLINE inline __attribute__((always_inline))
#define MS_INLINE_LAMBDA __attribute__((always_inline))
#else
#define MS_INLINE inline
#define MS_INLINE_LAMBDA
#endif

// MS_PREFETCH asks for the cache line of an address, which need not be valid. MS_NO_UNROLL stands before a short loop that
// gcc vectorizes only as long as it is a loop.
#if defined(__GNUC__)
#define MS_PREFETCH(address) __builtin_prefetch(address)
#else
#define MS_PREFETCH(address) static_cast<void>(address)
#endif
#if defined(__GNUC__) && !defined(__clang__)
#define MS_NO_UNROLL _Pragma("GCC unroll 1")
#else
#define MS_NO_UNROLL
#endif

// MS_CLONES compiles a function for several instruction sets and picks one when the library is loaded. It needs ifunc,
// which glibc has. Elsewhere the plain function stays: on ARM the baseline already has vector instructions.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(MS_NO_CLONES) && \
    ((defined(__GNUC__) && !defined(__clang__)) || (defined(__clang__) && __clang_major__ >= 14))
#define MS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MS_CLONES
#endif

namespace memsave {

// Raised with ABI_VERSION in memsave/ops/_native.py by a change of any kernel's arguments.
constexpr int64_t kAbiVersion = 7;

enum DType : int64_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

// The signature of torch_parallel_for, a C symbol of libtorch_cpu: calls body(begin, end, context) on pieces of at least
// `grain` items from several threads. Null where torch lacks it.
using RangeBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context);
extern ParallelFor g_parallel_for;

// body(begin, end) on pieces of [0, n). Loops worth vectorizing belong in a MS_CLONES function that the body calls: a
// lambda is compiled for the baseline.
template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  if (n <= grain || g_parallel_for == nullptr) {
    if (n > 0) body(int64_t{0}, n);
    return;
  }
  const RangeBody call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  g_parallel_for(0, n, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

template <class To, class From>
MS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// The 16-bit formats, converted between their bits (in 32) and float without branches, so that loops vectorize. Rounding
// is to nearest, ties to even.
struct BFloat16 {
  uint16_t bits;

  static MS_INLINE float widen(uint32_t bits) { return bit_cast<float>(bits << 16); }

  static MS_INLINE uint32_t narrow(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded;
  }
};

struct Float16 {
  uint16_t bits;

  static MS_INLINE float widen(uint32_t bits) {
    const uint32_t magnitude = bits & 0x7FFFu;
    const uint32_t normal = (magnitude << 13) + (112u << 23);  // 112: difference of the exponent biases
    const uint32_t subnormal = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    const uint32_t special = (magnitude << 13) | 0x7F800000u;
    const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
    return bit_cast<float>((magnitude >= 0x7C00u ? special : finite) | (bits & 0x8000u) << 16);
  }

  static MS_INLINE uint32_t narrow(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    const uint32_t rounded = (magnitude + 0x0FFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    const uint32_t normal = magnitude >= 0x47800000u ? 0x7C00u : rounded;  // from 65,536 on: infinity
    // Subnormal results are multiples of 2^-24: adding 2^23 lets the hardware round to an integer.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p24f + 0x1p23f) - 0x4B000000u;
    const uint32_t number = magnitude < 0x38800000u ? subnormal : normal;
    return (magnitude > 0x7F800000u ? 0x7E00u : number) | (bits >> 16 & 0x8000u);
  }
};

// Philox 4x32-10 (Salmon et al., SC 2011), the same as memsave/ops/philox.py.
struct Words {
  uint32_t w0, w1, w2, w3;
};

MS_INLINE Words philox(Words counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter.w0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.w2;
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter.w1 ^ key0, static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter.w3 ^ key1, static_cast<uint32_t>(product0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

constexpr uint32_t kPermutationStream = 0;
constexpr uint32_t kOffsetStream = 1;

// The words of a row: counter (row low, row high, stream, 0), key (seed low, seed high).
MS_INLINE Words row_words(uint64_t row, uint32_t stream, uint64_t seed) {
  return philox({static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), stream, 0u},
                static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

}  // namespace memsave
