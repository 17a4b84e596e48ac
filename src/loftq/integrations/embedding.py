"""An embedding whose table stays packed: a lookup dequantizes the rows it needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loftq.formats import FormatSpec
from loftq.nn.packed import PackedLayer
from loftq.ops import dequantize
from loftq.ops.panels import row_scales
from loftq.ops.reference import PER_TENSOR


class QuantEmbedding(PackedLayer, nn.Embedding):
    """nn.Embedding with a packed, frozen table (num_embeddings, embedding_dim).

    Args:
        num_embeddings: rows.
        embedding_dim: columns.
        spec: the format of the packed table.
        padding_idx: kept for those who ask; a frozen table has no gradient to mask.
        dtype: of the rows; default torch's.
        device: of the parameters.
    """

    dense_class = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        spec: FormatSpec,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._pack(spec, (num_embeddings, embedding_dim), dtype, device)

    @classmethod
    def from_dense(cls, module: nn.Module, spec: FormatSpec) -> QuantEmbedding:
        """An unfilled layer in the place of an nn.Embedding, in its dtype and on its device."""
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            raise ValueError(
                f"max_norm={module.max_norm} rewrites rows of the embedding at each lookup, which "
                'a packed table cannot do. Leave it dense with skip=["..."].'
            )
        if spec.rotation:
            raise ValueError(f"{spec} rotates the inputs of a layer, and an embedding has none.")
        weight = module.weight
        layer = cls(
            module.num_embeddings, module.embedding_dim, spec,
            padding_idx=module.padding_idx, dtype=weight.dtype, device=weight.device,
        )  # fmt: skip
        return layer.train(module.training)

    def forward(self, input: Tensor) -> Tensor:
        """Indices (...) -> rows (..., embedding_dim) in the layer's dtype."""
        ids = input.reshape(-1)
        bits, group_size, coding, levels, default_zero = self.layout
        scale, zero = self.weight_scale, self.weight_zero
        if group_size != PER_TENSOR:
            scale, zero = scale[ids], None if zero is None else zero[ids]
        if self.weight_nested is not None:
            # A row's nested scales lie in the middle of a run of 256, so they are decoded here.
            scale, coding = row_scales(scale, self.weight_nested, ids), "f32"
        rows = dequantize(
            self.weight_packed[ids], scale, zero, None, self.embedding_dim,
            bits, group_size, coding, levels, default_zero, self.compute_dtype,
        )  # fmt: skip
        return rows.view(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Geometry and format."""
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.spec}"
