// Packed codes as words whose low bits hold a code, over any instruction set.
#pragma once
#include "layout.h"

namespace {

// A block: one 32-bit word of the first plane for each lane, and for 3 bits 16 bits of the second.
template <int bits>
struct Block {
  static constexpr int codes = codes_per_word(bits);
  static constexpr int64_t columns = int64_t(codes) * Isa::lanes;
  static constexpr int64_t low = 4 * Isa::lanes, high = bits == 3 ? 2 * Isa::lanes : 0;  // bytes
  Isa::Words first, second;

  Block(const uint8_t* p, const uint8_t* q) : first(Isa::words(p)) {
    if constexpr (bits == 3) second = Isa::template left<2>(Isa::halves(q));
  }
  // The codes at place k; bits of other codes may stand above.
  template <int k>
  Isa::Words at() const {
    if constexpr (bits == 3) {
      return Isa::low_two(Isa::template right<2 * k>(first), Isa::template right<k>(second));
    } else {
      return Isa::template right<bits * k>(first);
    }
  }
};

// The value of a code before zero and scale. 8 bits have no codebook; they count from the middle.
template <int bits>
struct Values {
  typename Isa::template Levels<bits> levels;
  explicit Values(const float* table) : levels(table) {}
  Isa::Floats operator()(Isa::Words w) const { return levels(w); }
};

template <>
struct Values<8> {
  explicit Values(const float*) {}
  Isa::Floats operator()(Isa::Words w) const { return Isa::signed_byte(w); }
};

// Codebook levels, or the codes less their middle.
template <int bits>
void level_table(const loftq_weight& w, float* table) {
  for (int i = 0; i < (bits == 8 ? 0 : 1 << bits); ++i) {
    table[i] = w.has_levels ? w.levels[i] : float(i) - middle(w);
  }
}

}  // namespace
