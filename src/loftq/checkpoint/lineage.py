"""Which backbone an adapter belongs to.

From the second LoftQ iteration on, a backbone is not the rounded original: an adapter is only right
on the backbone it was made with. Both carry this hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from loftq.formats.tensor import COMPONENTS


def backbone_hash(hashes: Mapping[str, str]) -> str:
    """Hash of a backbone's packed tensors, from tensor name -> sha256 (others are left out).

    sha256 over one line "NAME HASH\\n" per packed tensor, names in the order of their UTF-8 bytes.
    """
    packed = [name for name in hashes if name.rpartition(".")[2] in COMPONENTS]
    packed.sort(key=str.encode)
    return hashlib.sha256("".join(f"{n} {hashes[n]}\n" for n in packed).encode()).hexdigest()
