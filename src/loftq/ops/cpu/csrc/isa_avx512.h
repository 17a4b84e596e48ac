// Sixteen lanes: AVX-512 F, BW, DQ and VL. A register holds all levels of a 4-bit grid, and a permute
// looks at the low four bits of each lane only: codes are shifted into place and need no mask. Narrower
// grids repeat their levels, so that bits of the neighbouring code do no harm.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Isa {
  static constexpr int lanes = 16;
  static constexpr int rows = 4, tokens = 4;
  using Floats = __m512;
  using Words = __m512i;

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats all(float a) { return _mm512_set1_ps(a); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static Floats load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static Floats load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
  static void store_bf16(uint16_t* p, Floats a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i high = _mm512_srli_epi32(up, 16);
    const __m512i kept = _mm512_mask_mov_epi32(high, nan, _mm512_set1_epi32(0x7FC0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(kept));
  }
  static void store_f16(uint16_t* p, Floats a) {
    const __m256i half = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Floats a) { return _mm512_reduce_add_ps(a); }

  static Words words(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Words halves(const uint8_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // 16 codes lie in 2 * width bytes; `column` is a multiple of 16.
  template <int width>
  static Words spread(const uint8_t* plane, int64_t column) {
    const uint8_t* p = plane + column * width / 8;
    if constexpr (width == 8) {
      return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    } else {
      const __m512i step = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
      uint64_t raw = 0;
      memcpy(&raw, p, 2 * width);
      if constexpr (width == 4) {
        const __m512i both = _mm512_set1_epi64(int64_t(raw));
        const __m512i half = _mm512_permutexvar_epi32(_mm512_srli_epi32(step, 3), both);
        const __m512i by = _mm512_and_si512(_mm512_slli_epi32(step, 2), _mm512_set1_epi32(31));
        return _mm512_srlv_epi32(half, by);
      }
      return _mm512_srlv_epi32(_mm512_set1_epi32(int32_t(raw)), _mm512_mullo_epi32(step, _mm512_set1_epi32(width)));
    }
  }
  template <int n>
  static Words right(Words a) { return _mm512_srli_epi32(a, n); }
  template <int n>
  static Words left(Words a) { return _mm512_slli_epi32(a, n); }
  static Words low_two(Words a, Words rest) {  // bits 0 and 1 of a, the others of rest
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(3), a, rest, 0xCA);
  }
  static Floats signed_byte(Words a) {  // the low byte less 128
    const __m512i flipped = _mm512_xor_si512(_mm512_slli_epi32(a, 24), _mm512_set1_epi32(INT32_MIN));
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(flipped, 24));
  }

  struct Pick {
    __m512i lane;
    explicit Pick(const int* group) : lane(_mm512_loadu_si512(group)) {}
    Floats operator()(const float* p) const { return _mm512_permutexvar_ps(lane, _mm512_loadu_ps(p)); }
  };

  template <int bits>
  struct Levels {
    __m512 table;
    explicit Levels(const float* levels) {
      float repeated[16];
      for (int i = 0; i < 16; ++i) repeated[i] = levels[i & ((1 << bits) - 1)];
      table = _mm512_loadu_ps(repeated);
    }
    Floats operator()(Words w) const { return _mm512_permutexvar_ps(w, table); }
  };
};

}  // namespace
