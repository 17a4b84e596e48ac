// One lane: plain C++, on any machine. The interface that the other instruction sets follow. Sums are
// float64, since a single lane adds up many more numbers one after another.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

struct Isa {
  static constexpr int lanes = 1;
  static constexpr int rows = 4, tokens = 1;  // of a tile of the product
  using Floats = double;
  using Words = uint32_t;

  static Floats zero() { return 0.0; }
  static Floats all(float a) { return a; }
  static Floats load(const float* p) { return *p; }
  static Floats load_bf16(const uint16_t* p) { return from_bf16(*p); }
  static Floats load_f16(const uint16_t* p) { return from_f16(*p); }
  static void store(float* p, Floats a) { *p = float(a); }
  static void store_bf16(uint16_t* p, Floats a) { *p = to_bf16(float(a)); }
  static void store_f16(uint16_t* p, Floats a) { *p = to_f16(float(a)); }
  static Floats mul(Floats a, Floats b) { return a * b; }
  static Floats sub(Floats a, Floats b) { return a - b; }
  static Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
  static float sum(Floats a) { return float(a); }

  // One word for each lane; a 16-bit word; and the same bytes for all lanes, each shifted to its code.
  static Words words(const uint8_t* p) {
    uint32_t w;
    memcpy(&w, p, 4);
    return w;
  }
  static Words halves(const uint8_t* p) {
    uint16_t w;
    memcpy(&w, p, 2);
    return w;
  }
  template <int width>
  static Words spread(const uint8_t* plane, int64_t column) {
    return uint32_t(plane[column * width / 8]) >> (column * width % 8);
  }
  template <int n>
  static Words right(Words a) { return a >> n; }
  template <int n>
  static Words left(Words a) { return a << n; }
  static Words low_two(Words a, Words rest) { return (a & 3) | (rest & ~3u); }
  static Floats signed_byte(Words a) { return int32_t(a << 24 ^ 0x80000000u) >> 24; }

  // The float at p for each lane, by the lane's group.
  struct Pick {
    explicit Pick(const int*) {}
    Floats operator()(const float* p) const { return *p; }
  };

  // The level of the low `bits` bits of each word; what stands above them is ignored.
  template <int bits>
  struct Levels {
    const float* table;
    explicit Levels(const float* levels) : table(levels) {}
    Floats operator()(Words w) const { return table[w & ((1 << bits) - 1)]; }
  };
};

}  // namespace
