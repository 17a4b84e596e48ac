// Runs the calls of an image: memory of another process with its tensors, structures and calls in it.
//
//     replay IMAGE RESULT
//
// The image opens with a Header and the calls; structures follow. Numbers there that lie in the memory's
// old place are addresses, and are moved to the new one.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "loftq_cpu.h"

namespace {

struct Header {
  uint64_t place, size, structures;
  int64_t calls;
};

enum Function { FIT, ROUND, PACK, DEQUANTIZE, PROJECT };

struct Call {
  int64_t function, result, a[8];
  template <class T>
  T* at(int i) const { return reinterpret_cast<T*>(a[i]); }
};

int64_t run(const Call& c) {
  const auto* team = c.at<loftq_team>(0);
  switch (c.function) {
    case FIT: return loftq_fit(team, c.at<loftq_grid>(1), c.at<float>(2), c.a[3], c.at<float>(4), c.at<float>(5));
    case ROUND:
      return loftq_round(team, c.at<loftq_grid>(1), c.at<float>(2), c.a[3], c.at<float>(4), c.at<float>(5),
                         c.at<uint8_t>(6), c.at<float>(7));
    case PACK: return loftq_pack(team, c.at<uint8_t>(1), c.a[2], c.a[3], int32_t(c.a[4]), c.at<uint8_t>(5));
    case DEQUANTIZE: return loftq_dequantize(team, c.at<loftq_weight>(1), int32_t(c.a[2]), c.at<void>(3));
    case PROJECT:
      return loftq_project(team, c.at<loftq_projection>(1), int32_t(c.a[2]), c.at<void>(3), c.a[4],
                           int32_t(c.a[5]), c.at<void>(6));
  }
  return -1;
}

}  // namespace

int main(int, char** paths) {
  std::FILE* from = std::fopen(paths[1], "rb");
  std::fseek(from, 0, SEEK_END);
  const size_t size = size_t(std::ftell(from));
  std::rewind(from);
  auto* memory = static_cast<uint8_t*>(std::aligned_alloc(64, size));
  if (std::fread(memory, 1, size, from) != size) return 1;
  auto* words = reinterpret_cast<uint64_t*>(memory);
  const Header header = *reinterpret_cast<Header*>(memory);
  if (header.size != size) return 2;
  for (uint64_t i = 0; i < header.structures / 8; ++i) {
    if (words[i] - header.place < size) words[i] += reinterpret_cast<uint64_t>(memory) - header.place;
  }
  auto* calls = reinterpret_cast<Call*>(memory + sizeof header);
  for (int64_t i = 0; i < header.calls; ++i) calls[i].result = run(calls[i]);
  std::FILE* to = std::fopen(paths[2], "wb");
  return std::fwrite(memory, 1, size, to) == size && !std::fclose(to) ? 0 : 3;
}
