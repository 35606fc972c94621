// One bit for each element of a mask, eight to a byte, least significant bit first; each row begins with a new byte.
//
// mask (N, D) of bytes 0 and 1, bits (N, B) with B = ceil(D / 8), both contiguous.
#include <algorithm>

#include "common.h"

namespace memsave {
namespace {

constexpr int64_t kGrainElements = 1 << 16;

// The product puts bit 0 of byte i at bit 56 + i, and no two of its terms meet.
MS_INLINE uint8_t pack_eight(const uint8_t* mask) {
  uint64_t word;
  std::memcpy(&word, mask, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  word = __builtin_bswap64(word);
#endif
  return static_cast<uint8_t>(word * 0x0102040810204080u >> 56);
}

MS_CLONES void pack_rows(const uint8_t* mask, int64_t columns, uint8_t* bits, int64_t begin, int64_t end) {
  const int64_t whole = columns / 8, bytes = (columns + 7) / 8;
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* source = mask + row * columns;
    uint8_t* target = bits + row * bytes;
    for (int64_t b = 0; b < whole; ++b) target[b] = pack_eight(source + 8 * b);
    if (whole < bytes) {
      uint8_t rest[8] = {};
      std::copy(source + 8 * whole, source + columns, rest);
      target[whole] = pack_eight(rest);
    }
  }
}

}  // namespace
}  // namespace memsave

MS_EXPORT int64_t ms_pack_bits(const uint8_t* mask, int64_t n_rows, int64_t columns, uint8_t* bits) {
  using namespace memsave;
  if (columns == 0) return 0;
  parallel_for(n_rows, std::max<int64_t>(1, kGrainElements / columns),
               [=](int64_t begin, int64_t end) { pack_rows(mask, columns, bits, begin, end); });
  return 0;
}
