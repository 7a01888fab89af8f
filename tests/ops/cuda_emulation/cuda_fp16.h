// half, on the processor.
#pragma once
struct __half {
  _Float16 x;
};
inline float __half2float(__half x) { return x.x; }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
