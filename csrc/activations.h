// The activation functions of memsave/ops/activation/kind.py in float, and kernels' way over the elements of matrices.
//
// Each function has its value at x and its gradient from dy, without branches, so that loops vectorize. NaN and infinities
// give what torch's operators give.
#pragma once

#include "exponential.h"
#include "row_blocks.h"

namespace memsave {

enum Kind : int64_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kQuickGelu = 3, kRelu = 4, kReluSquared = 5, kMish = 6 };

MS_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

struct Silu {
  static MS_INLINE float value(float x) { return x * sigmoid(x); }
  static MS_INLINE float gradient(float dy, float x) {
    const float s = sigmoid(x);
    return dy * (s * (1.0f + x * (1.0f - s)));
  }
};

struct QuickGelu {
  static constexpr float kScale = 1.702f;

  static MS_INLINE float value(float x) { return x * sigmoid(kScale * x); }
  static MS_INLINE float gradient(float dy, float x) {
    const float s = sigmoid(kScale * x);
    return dy * (s * (1.0f + kScale * (x * (1.0f - s))));
  }
};

// x Phi(x), with Phi(-a) = exp(-a^2 / 2) t P(t) for a >= 0 and t = 1 / (1 + 0.35 a); P was fitted to a relative error of
// 4e-8.
struct Gelu {
  static MS_INLINE float tail(float a, float bell) {
    const float t = 1.0f / (1.0f + 0.35f * a);
    float p = -0.029164958745241165f;
    p = p * t + 0.14406591653823853f;
    p = p * t - 0.2559126615524292f;
    p = p * t + 0.15940549969673157f;
    p = p * t - 0.023272711783647537f;
    p = p * t + 0.10557865351438522f;
    p = p * t + 0.11981449276208878f;
    p = p * t + 0.1398644745349884f;
    p = p * t + 0.13962124288082123f;
    return bell * (t * p);
  }
  static MS_INLINE float cumulative(float x, float bell) {
    const float q = tail(x < 0.0f ? -x : x, bell);
    return x < 0.0f ? q : 1.0f - q;
  }
  static MS_INLINE float value(float x) { return x * cumulative(x, exp_of(-0.5f * x * x)); }
  static MS_INLINE float gradient(float dy, float x) {
    const float bell = exp_of(-0.5f * x * x);
    return dy * (cumulative(x, bell) + x * (bell * 0.3989422804014327f));
  }
};

// 0.5 (1 + tanh(u)) is sigmoid(2 u), here with u = sqrt(2 / pi) (x + 0.044715 x^3). The slope has large factors: it takes
// 1 - sigmoid(2 u) without cancellation.
struct GeluTanh {
  static constexpr float kTwice = 1.5957691216057308f, kCubic = 0.044715f;

  static MS_INLINE float twice(float x) { return kTwice * (x + kCubic * (x * x * x)); }
  static MS_INLINE float nearer(float e) { return 1.0f / (1.0f + e); }  // the sigmoid of whichever of 2 u, -2 u is positive
  static MS_INLINE float value(float x) {
    const float u = twice(x), e = exp_of(u < 0.0f ? u : -u), s = nearer(e);
    return x * (u < 0.0f ? e * s : s);
  }
  static MS_INLINE float gradient(float dy, float x) {
    const float u = twice(x), e = exp_of(u < 0.0f ? u : -u), near = nearer(e), far = e * near;
    const float s = u < 0.0f ? far : near;
    return dy * (s + (x * near) * far * (kTwice * (1.0f + 3.0f * kCubic * (x * x))));
  }
};

struct Relu {
  static MS_INLINE float value(float x) { return x < 0.0f ? 0.0f : x; }
  static MS_INLINE float gradient(float dy, float x) { return x <= 0.0f ? 0.0f : dy; }
};

struct ReluSquared {
  static MS_INLINE float value(float x) { return Relu::value(x) * Relu::value(x); }
  static MS_INLINE float gradient(float dy, float x) { return x <= 0.0f ? 0.0f : 2.0f * x * dy; }
};

// tanh(log(1 + e)) is n / (n + 2) with n = e (e + 2) and e = exp(x); from x = 20 on it is 1.
struct Mish {
  static MS_INLINE float exp_below_20(float x) { return exp_of(x > 20.0f ? 20.0f : x); }
  static MS_INLINE float factor(float e) {
    const float n = e * (e + 2.0f);
    return n / (n + 2.0f);
  }
  static MS_INLINE float value(float x) { return x * factor(exp_below_20(x)); }
  static MS_INLINE float gradient(float dy, float x) {
    const float e = exp_below_20(x), t = factor(e);
    return dy * (t + x * (1.0f - t * t) * (e / (1.0f + e)));
  }
};

// function<Silu>(...), or another: inside a MS_CLONES function, where a lambda would be compiled for the baseline.
#define MS_WITH_ACTIVATION(kind, function, ...)                  \
  switch (kind) {                                                \
    case kSilu: return function<Silu>(__VA_ARGS__);              \
    case kGelu: return function<Gelu>(__VA_ARGS__);              \
    case kGeluTanh: return function<GeluTanh>(__VA_ARGS__);      \
    case kQuickGelu: return function<QuickGelu>(__VA_ARGS__);    \
    case kRelu: return function<Relu>(__VA_ARGS__);              \
    case kReluSquared: return function<ReluSquared>(__VA_ARGS__); \
    case kMish: return function<Mish>(__VA_ARGS__);              \
  }

// A matrix whose rows may be apart; its columns are next to each other.
struct Rows {
  const void* data;
  int64_t stride;
};

// Matrices of one shape and dtype, cut into pieces of one row, of at most kBlock elements.
struct Pieces {
  int64_t dtype, rows, columns;

  MS_INLINE int64_t per_row() const { return (columns + kBlock - 1) / kBlock; }
  MS_INLINE int64_t count() const { return rows * per_row(); }
  MS_INLINE int64_t start(int64_t piece) const { return piece % per_row() * kBlock; }
  MS_INLINE int64_t size(int64_t piece) const { return std::min(kBlock, columns - start(piece)); }

  MS_INLINE const float* read(const Rows& from, int64_t piece, float* buffer) const {
    const char* row = static_cast<const char*>(from.data) + piece / per_row() * row_bytes(dtype, from.stride);
    return load(row, dtype, start(piece), size(piece), buffer);
  }
  // Where to put a piece of a matrix with contiguous rows: there, or in `buffer`, from which `write` narrows it.
  MS_INLINE float* place(void* to, int64_t piece, float* buffer) const {
    return dtype == kFloat32 ? static_cast<float*>(to) + piece / per_row() * columns + start(piece) : buffer;
  }
  MS_INLINE void write(const float* values, void* to, int64_t piece) const {
    if (dtype == kFloat32) return;
    store(values, static_cast<char*>(to) + piece / per_row() * row_bytes(dtype, columns), dtype, start(piece), size(piece));
  }
};

constexpr int64_t kPiecesPerThread = 16;

}  // namespace memsave
