// Eight lanes: AVX2, FMA and F16C. A permute looks up eight levels by the low three bits of a lane; a
// 4-bit grid takes two of them, and its top bit, shifted to the sign, blends.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Isa {
  static constexpr int lanes = 8;
  static constexpr int rows = 2, tokens = 4;
  using Floats = __m256;
  using Words = __m256i;

  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats all(float a) { return _mm256_set1_ps(a); }
  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static Floats load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static Floats load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
  static void store_bf16(uint16_t* p, Floats a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(up, 16);
    const __m256i kept = _mm256_blendv_epi8(high, _mm256_set1_epi32(0x7FC0), nan);
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(halves));
  }
  static void store_f16(uint16_t* p, Floats a) {
    const __m128i half = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
  }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(Floats a) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
  }

  static Words words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Words halves(const uint8_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // 8 codes lie in `width` bytes; `column` is a multiple of 8.
  template <int width>
  static Words spread(const uint8_t* plane, int64_t column) {
    const uint8_t* p = plane + column * width / 8;
    uint64_t raw = 0;
    memcpy(&raw, p, width);
    if constexpr (width == 8) {
      return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(raw)));
    }
    const __m256i step = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i by = _mm256_mullo_epi32(step, _mm256_set1_epi32(width));
    return _mm256_srlv_epi32(_mm256_set1_epi32(int32_t(raw)), by);
  }
  template <int n>
  static Words right(Words a) { return _mm256_srli_epi32(a, n); }
  template <int n>
  static Words left(Words a) { return _mm256_slli_epi32(a, n); }
  static Words low_two(Words a, Words rest) {
    const __m256i three = _mm256_set1_epi32(3);
    return _mm256_or_si256(_mm256_and_si256(three, a), _mm256_andnot_si256(three, rest));
  }
  static Floats signed_byte(Words a) {
    const __m256i flipped = _mm256_xor_si256(_mm256_slli_epi32(a, 24), _mm256_set1_epi32(INT32_MIN));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(flipped, 24));
  }

  struct Pick {
    __m256i lane;
    explicit Pick(const int* group) : lane(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(group))) {}
    Floats operator()(const float* p) const { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), lane); }
  };

  template <int bits>
  struct Levels {
    __m256 lower, upper;
    explicit Levels(const float* levels) {
      float repeated[16];
      for (int i = 0; i < 16; ++i) repeated[i] = levels[i & ((1 << bits) - 1)];
      lower = _mm256_loadu_ps(repeated);
      upper = _mm256_loadu_ps(repeated + 8);
    }
    Floats operator()(Words w) const {
      const __m256 low = _mm256_permutevar8x32_ps(lower, w);
      if constexpr (bits < 4) return low;
      const __m256 high = _mm256_permutevar8x32_ps(upper, w);
      return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(w, 28)));
    }
  };
};

}  // namespace
