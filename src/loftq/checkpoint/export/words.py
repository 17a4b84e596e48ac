"""Codes as a stream of bits in 32-bit words, low bits first: GPTQ and compressed-tensors.

At 2, 4 and 8 bits this is our own packing seen as words; 3-bit codes cross words, where we store
two planes.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32
AT_ONCE = 1 << 22  # codes taken apart at a time: bounds the working memory


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Words (rows, ceil(columns * bits / 32)) int32 of codes (rows, columns) uint8.

    Code k of a row occupies the bits k * bits ... of the row's stream; the last word is padded with
    zeros.
    """
    count = -(-codes.shape[1] * bits // WORD)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8))
    eight = codes.unflatten(1, (-1, 8))  # eight codes are `bits` whole bytes
    joined = torch.zeros(eight.shape[:2], dtype=torch.int64, device=codes.device)
    for k in range(8):
        joined |= eight[..., k].long() << (k * bits)
    stream = torch.stack([(joined >> (8 * k)) & 255 for k in range(bits)], -1).to(torch.uint8)
    stream = stream.flatten(1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 4))
    return stream.contiguous().view(torch.int32)[:, :count].contiguous()


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """Codes (rows, columns) uint8 of such words: code k is read at its place in the stream."""
    place = torch.arange(columns) * bits
    first, shift = place // WORD, place % WORD
    second = (first + 1).clamp_max(words.shape[1] - 1)
    codes = torch.empty(words.shape[0], columns, dtype=torch.uint8)
    step = max(1, AT_ONCE // columns)
    for start in range(0, words.shape[0], step):
        rows = words[start : start + step].long() & 0xFFFFFFFF
        value = (rows[:, first] >> shift) | (rows[:, second] << (WORD - shift))
        codes[start : start + step] = (value & (2**bits - 1)).to(torch.uint8)
    return codes
