// e^x and tanh x without branches, so that loops over them vectorize.
#pragma once

#include <cmath>

#include "common.h"

namespace memsave {

// e^x = 2^n e^r with |r| <= log(2) / 2, within two units in the last place; 0 below -87.3, infinite above 88.37, NaN of
// NaN.
MS_INLINE float exp_of(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, in the lowest bits
  const float shifted = x * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.3814611593261361e-3f;
  p = p * r + 8.368710055947304e-3f;
  p = p * r + 4.166838899254799e-2f;
  p = p * r + 1.666652113199234e-1f;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.0f;
  const uint32_t exponent = bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(kRound) + 127u;
  const float result = p * bit_cast<float>(exponent << 23);
  const float bounded = x > 88.37f ? HUGE_VALF : result;
  return x < -87.3f ? 0.0f : bounded;
}

// The polynomial is from Cephes (S. L. Moshier).
MS_INLINE float tanh_of(float x) {
  const float square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float small = p * square * x + x;
  const float e = exp_of(-2.0f * std::fabs(x));
  const float large = std::copysign((1.0f - e) / (1.0f + e), x);
  return std::fabs(x) < 0.625f ? small : large;
}

}  // namespace memsave
