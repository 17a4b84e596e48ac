// Four lanes: NEON of 64-bit Arm. A table instruction looks up single bytes: a code c becomes the byte
// numbers 4 c .. 4 c + 3 of its level, in a table of 16 to 64 bytes.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace {

struct Isa {
  static constexpr int lanes = 4;
  static constexpr int rows = 2, tokens = 4;
  using Floats = float32x4_t;
  using Words = uint32x4_t;

  static Floats zero() { return vdupq_n_f32(0.0f); }
  static Floats all(float a) { return vdupq_n_f32(a); }
  static Floats load(const float* p) { return vld1q_f32(p); }
  static Floats load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
  static Floats load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static void store(float* p, Floats a) { vst1q_f32(p, a); }
  static void store_bf16(uint16_t* p, Floats a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t high = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF))), 16);
    vst1_u16(p, vmovn_u32(vbslq_u32(vceqq_f32(a, a), high, vdupq_n_u32(0x7FC0))));
  }
  static void store_f16(uint16_t* p, Floats a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
  static Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats sub(Floats a, Floats b) { return vsubq_f32(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static float sum(Floats a) { return vaddvq_f32(a); }

  static Words words(const uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
  static Words halves(const uint8_t* p) { return vmovl_u16(vreinterpret_u16_u8(vld1_u8(p))); }
  // 4 codes lie in width / 2 bytes, or in half of one; `column` is a multiple of 4.
  template <int width>
  static Words spread(const uint8_t* plane, int64_t column) {
    uint32_t raw = 0;
    memcpy(&raw, plane + column * width / 8, width == 1 ? 1 : width / 2);
    raw >>= column * width % 8;
    const int32x4_t by = {0, -width, -2 * width, -3 * width};
    return vshlq_u32(vdupq_n_u32(raw), by);
  }
  template <int n>
  static Words right(Words a) {
    if constexpr (n == 0) return a;
    else return vshrq_n_u32(a, n);
  }
  template <int n>
  static Words left(Words a) { return vshlq_n_u32(a, n); }
  static Words low_two(Words a, Words rest) { return vbslq_u32(vdupq_n_u32(3), a, rest); }
  static Floats signed_byte(Words a) {
    const uint32x4_t flipped = veorq_u32(vshlq_n_u32(a, 24), vdupq_n_u32(0x80000000u));
    return vcvtq_f32_s32(vshrq_n_s32(vreinterpretq_s32_u32(flipped), 24));
  }

  struct Pick {
    uint8x16_t lane;
    explicit Pick(const int* group) {
      uint8_t bytes[16];
      for (int i = 0; i < 16; ++i) bytes[i] = uint8_t(4 * group[i / 4] + i % 4);
      lane = vld1q_u8(bytes);
    }
    Floats operator()(const float* p) const {
      return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(vld1q_f32(p)), lane));
    }
  };

  template <int bits>
  struct Levels {
    uint8x16x4_t table;
    explicit Levels(const float* levels) {
      float repeated[16];
      for (int i = 0; i < 16; ++i) repeated[i] = levels[i & ((1 << bits) - 1)];
      for (int i = 0; i < 4; ++i) table.val[i] = vreinterpretq_u8_f32(vld1q_f32(repeated + 4 * i));
    }
    Floats operator()(Words w) const {
      const uint32x4_t code = vandq_u32(w, vdupq_n_u32((1 << bits) - 1));
      const uint32x4_t number = vmlaq_n_u32(vdupq_n_u32(0x03020100), code, 0x04040404);
      const uint8x16_t at = vreinterpretq_u8_u32(number);
      if constexpr (bits == 2) return vreinterpretq_f32_u8(vqtbl1q_u8(table.val[0], at));
      if constexpr (bits == 3) return vreinterpretq_f32_u8(vqtbl2q_u8({{table.val[0], table.val[1]}}, at));
      return vreinterpretq_f32_u8(vqtbl4q_u8(table, at));
    }
  };
};

}  // namespace
