// The numbers of the rotation, on the CPU and on the device. Angles are counted in turns, as 64-bit fractions: a phase is
// the exact product position * step modulo one turn, whatever the position.
//
//   phase    = position * step                              uint64, wraps
//   quadrant = (phase + 2^61) >> 62                         nearest quarter turn, 0..3 (the sum wraps)
//   x        = float(int32((phase - (quadrant << 62)) >> 32)) * 2^-32    turns from it, in [-1/8, 1/8]; arithmetic shift,
//                                                           rounded once, to nearest even; the factor is exact
//   z        = x * x
//   sine     = fma(x, kTurn, x * fma(z, fma(z, fma(z, kSine[3], kSine[2]), kSine[1]), kSine[0]))
//   cosine   = fma(z, fma(z, fma(z, fma(z, kCosine[3], kCosine[2]), kCosine[1]), kCosine[0]), 1)
//   quadrant 0: (cos, sin) = (cosine, sine); 1: (-sine, cosine); 2: (-cosine, -sine); 3: (sine, -cosine)
//
// Each operation rounds once, in float32; fma is one operation. cos and sin are within 8e-8 of the exact ones.
#pragma once
#include <cstdint>

namespace perigee::kernels::rope {

inline constexpr float kTurn = 0x1.921fb6p+2f;  // 2 pi
// sin(2 pi x) / x - kTurn and (cos(2 pi x) - 1) / x^2 as polynomials in x^2 on [0, 1/64].
inline constexpr float kSine[4] = {-0x1.a1114ap-23f, -0x1.4abbbap+5f, 0x1.465ec4p+6f, -0x1.2d9b40p+6f};
inline constexpr float kCosine[4] = {-0x1.3bd3ccp+4f, 0x1.03c1eap+6f, -0x1.55cb98p+6f, 0x1.db6492p+5f};

}  // namespace perigee::kernels::rope
