// bfloat16, on the processor: the upper half of a float.
#pragma once
#include <cmath>
#include <cstring>
struct __nv_bfloat16 {
  unsigned short x;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const unsigned bits = unsigned(x.x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
