"""Round to nearest: each weight to the closest value of its group's grid."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from loftq.formats import (
    FormatSpec,
    QuantizedTensor,
    from_stored_basis,
    grid_of,
    round_trip_scales,
    to_stored_basis,
)


@dataclass(frozen=True)
class Rounded:
    """A stack of rounded weights: codes with the fitted scales and zeros they belong to."""

    spec: FormatSpec
    codes: Tensor
    """(n, out_features, in_features) uint8."""
    scales: Tensor
    """(n, out_features, groups) float32, as fitted; storing them again gives the same bytes."""
    zeros: Tensor | None
    """(n, out_features, groups) float32, or None."""

    def decode(self) -> Tensor:
        """Values (n, out_features, in_features) float32 under the scales as they are stored.

        In the basis of W: those of a rotated format are turned back.
        """
        stored = round_trip_scales(self.scales, self.spec.scale_coding)
        values = grid_of(self.spec).decode(self.codes, stored, self.zeros)
        return from_stored_basis(values, self.spec)

    def pack(self, index: int) -> QuantizedTensor:
        """The stored form of one weight of the stack."""
        zeros = None if self.zeros is None else self.zeros[index]
        return QuantizedTensor.from_codes(self.spec, self.codes[index], self.scales[index], zeros)

    def where(self, better: Tensor, other: Rounded) -> Rounded:
        """The weights of `other` where `better` (n,) bool is set, else those of this one."""
        found = Rounded(
            self.spec,
            self.codes.clone(),
            self.scales.clone(),
            None if self.zeros is None else self.zeros.clone(),
        )
        found.update_(better, other)
        return found

    def update_(self, better: Tensor, other: Rounded) -> None:
        """Take over the weights of `other` where `better` (n,) bool is set, in place."""
        self.codes[better] = other.codes[better]
        self.scales[better] = other.scales[better]
        if self.zeros is not None and other.zeros is not None:
            self.zeros[better] = other.zeros[better]


def round_to_nearest(W: Tensor, spec: FormatSpec, *, fit: str) -> tuple[Rounded, Tensor]:
    """Quantize a stack of weights group by group, nearest code under the stored scale.

    Args:
        W: (n, out_features, in_features) float32.
        spec: the format.
        fit: rule that chooses a group's scale: "absmax", "mse" or "sigma" (formats/grids.py).

    Returns:
        (Rounded, values (n, out_features, in_features) float32) on W.device; the values are those
        of the packed weight dequantized, bit for bit but for the sums of a rotation.
    """
    if spec.rotation:
        turned = to_stored_basis(W, spec)
        rounded, values = round_to_nearest(turned, replace(spec, rotation=0), fit=fit)
        return replace(rounded, spec=spec), from_stored_basis(values, spec)
    grid = grid_of(spec)
    scales, zeros = grid.fit(W, fit)
    stored = round_trip_scales(scales, spec.scale_coding)
    codes, values = grid.round(W, stored, zeros)
    return Rounded(spec, codes, scales, zeros), values
