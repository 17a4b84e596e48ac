"""What a user may choose about a quantization; resolved once and written into every output."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace

from loftq.allocation import ALLOCATIONS, MEASURED, Allocation
from loftq.formats import FITS, FormatSpec, parse_format
from loftq.lowrank import SOLVERS
from loftq.methods import Method, find_method
from loftq.refine import Refinement, find_refinement
from loftq.rounding import MOST_DAMPING
from loftq.transforms import ROTATIONS

CONFIG_VERSION = 1

TABLE_FORMAT = "sint8-g64-f16"
"""Format behind embedding=8 and head=8: symmetric, so that 0 stays 0, and each row by itself."""

BITS_FORMATS = {4: "nf4-g64-dq", 3: "nf3-g64-dq", 2: "nf2-g64-dq"}
"""Format behind --bits. A fraction b between 2 and 4 mixes the 4- and 2-bit ones by depth."""

ENGINE_FORMATS = {
    "transformers": "nf4-g64-dq",
    "vllm": "sint4-g64-f16",
    "llama.cpp": "iq4nl-g32-f16",
}
"""Format that each serving engine can hold without loss (--for)."""


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Every choice of `loftq quantize`; the command line's flags and key=value pairs."""

    method: str = "loftq"
    """Row of the method table: loftq, qlora, fast, best, max, or one that `loftq lab methods`
    lists."""
    bits: float = 4
    """4, 3 or 2; a fraction in between mixes 4 and 2 bits by depth, as the paper does. With a
    measured allocation the most bits per weight all told, scales and zeros included."""
    allocation: str = "first"
    """How a fraction of bits is spent: first (blocks, by depth) or by measured cost, exactly within
    the budget: error, relative or kl (allocation/)."""
    candidates: tuple[str, ...] = ()
    """Formats that a measured allocation chooses from; empty = those of 2, 3 and 4 bits."""
    costs_by: str | None = None
    """Method that a measured allocation takes its costs from; None = `method` itself."""
    allocation_windows: int = 4
    """Windows of the calibration text that allocation=kl measures on."""
    rotation: str = "none"
    """Rotated inputs (transforms/rotation.py): none, all, or auto, for each layer whose error is
    smaller with them."""
    format: str | None = None
    """Format by name (nf4-g64-dq, int3-g128-f16, ...); overrides bits."""
    formats: Mapping[str, str] = field(default_factory=dict)
    """Other formats by module pattern: {"*.down_proj": "nf4"}; the last match wins."""
    rank: int = 16
    """Rank of the adapters."""
    ranks: tuple[int, ...] = ()
    """Ranks that a measured allocation chooses from, layer by layer; the bytes of all adapters then
    count in its budget, which grows by those of `rank` everywhere. Empty = `rank` everywhere."""
    alpha: float | None = None
    """LoRA's alpha; None = rank. The start is exact for any positive value."""
    rslora: bool = False
    """Scale the product by alpha / sqrt(rank) instead of alpha / rank."""
    iters: int | None = None
    """Alternations T; None = the method's own."""
    scale_fit: str | None = None
    """absmax, mse, sigma or entropy; None = the method's, else the format's default. A table in 8
    bits has its own where it lacks this one."""
    solver: str | None = None
    """chebyshev or exact; None = the method's own."""
    order: str | None = None
    """quantize-first or correct-first; None = the method's own."""
    targets: tuple[str, ...] = ()
    """Patterns or names of the modules to quantize; empty = every linear of the blocks."""
    skip: tuple[str, ...] = ()
    """Patterns or names of modules to leave at 16 bits."""
    embeddings: bool = False
    """Quantize the embeddings too and give them adapters, as the paper does for DeBERTa."""
    embedding: int = 16
    """8 stores the token embedding in 8 bits, without an adapter; 16 leaves it as it is."""
    head: int = 16
    """8 stores the output head in 8 bits, without an adapter; a head tied to the embedding is
    stored once, so that either key packs both."""
    seed: int = 0
    """Of everything random; each weight derives its own from it and its name."""
    allow_uncovered: bool = False
    """Accept a model of which over a fifth of the linear weights would stay 16-bit."""
    data: str | None = None
    """Text to calibrate on (.txt, .raw, .jsonl, also .gz) for methods that need it; never changes
    which method runs."""
    calibration_windows: int = 128
    """Most windows of text."""
    calibration_context: int = 1024
    """Tokens of a window; shortened to what the model takes."""
    statistics: str | None = None
    """Folder that keeps statistics for other methods and widths; None = the user's cache."""
    damping: float | None = None
    """Added to a Gram's diagonal, relative to its mean; None = the method's own."""
    design_rank: int | None = None
    """Rank of the correction that `projq` rounds for; None = that of the adapter."""
    refine: str | None = None
    """Gradient refinement of the adapters: none, layer, block, hidden-language, distill, natural or
    block-distill, which need text; None = the method's own."""
    refine_epochs: float | None = None
    """Passes over the text in each stage of the refinement, and for natural whole steps of each
    block; None = its own, 0 = keep the start."""
    strict: bool = False
    """Raise instead of recording extra damping or calibration tokens that had to be left out."""
    engine: str | None = None
    """Serve with transformers, vllm or llama.cpp: picks a format that it can hold."""

    def __post_init__(self) -> None:
        problem = self._check() or self._check_names()
        if problem:
            raise ValueError(problem)

    def _check(self) -> str:
        if self.rank < 1:
            return f"rank={self.rank}: must be at least 1."
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            return (
                f"alpha={self.alpha}: must be positive. At alpha = 0 the adapter has no effect and "
                "no start can correct the rounding; leave it out to use alpha = rank."
            )
        if self.design_rank is not None and self.design_rank < 1:
            return f"design_rank={self.design_rank}: must be at least 1."
        if self.iters is not None and self.iters < 0:
            return f"iters={self.iters}: must be 0 (plain rounding) or more."
        if self.calibration_windows < 1 or self.calibration_context < 1:
            return (
                f"calibration_windows={self.calibration_windows}, "
                f"calibration_context={self.calibration_context}: must be at least 1."
            )
        if self.damping is not None and not 0 <= self.damping <= MOST_DAMPING:
            return (
                f"damping={self.damping}: must lie between 0 and {MOST_DAMPING:g} times the mean "
                "of the Gram's diagonal."
            )
        if self.allocation_windows < 1:
            return f"allocation_windows={self.allocation_windows}: must be at least 1."
        if self.refine_epochs is not None and not 0 <= self.refine_epochs < math.inf:
            return f"refine_epochs={self.refine_epochs}: must be 0 (keep the start) or more."
        if self.engine is not None and (self.format is not None or self.bits != 4):
            return (
                f"engine={self.engine}: picks the format by itself; leave bits and format out, or "
                "name a format and see in the plan which engines can hold it."
            )
        if self.engine is not None and self.rotation != "none":
            return (
                f"rotation={self.rotation}, engine={self.engine}: no engine but loftq's own turns "
                "the inputs of a layer. Leave one of them out."
            )
        for key in ("embedding", "head"):
            if getattr(self, key) not in (8, 16):
                return (
                    f"{key}={getattr(self, key)}: choose 8 (packed, without an adapter) or 16 "
                    "(as it is)."
                )
        if self.embeddings and self.embedding == 8:
            return (
                "embedding=8 and embeddings=true exclude each other: the first stores the table in "
                "8 bits without an adapter, the second in the backbone's format with one."
            )
        if self.format is None and not 2 <= self.bits <= 4:
            return (
                f"bits={self.bits:g}: choose 4, 3, 2 or a fraction between 2 and 4; other widths "
                "by name, for example --format int8-g64."
            )
        return ""

    def _check_names(self) -> str:
        for key, value, known in (
            ("scale_fit", self.scale_fit, FITS),
            ("solver", self.solver, SOLVERS),
            ("engine", self.engine, tuple(ENGINE_FORMATS)),
            ("allocation", self.allocation, tuple(ALLOCATIONS)),
            ("rotation", self.rotation, ROTATIONS),
        ):
            if value is not None and value not in known:
                return f"{key}={value!r} does not exist; choose one of {', '.join(known)}."
        if self.refine is not None:
            find_refinement(self.refine)
        self.resolved_method()
        self.default_format()
        for name in self.formats.values():
            parse_format(name)
        return self._check_refinement() or self._check_allocation()

    def _check_refinement(self) -> str:
        """Natural-gradient steps, which are counted whole and start from a product."""
        if not any(stage.scope == "natural" for stage in self.refinement().stages):
            return ""
        steps = self.refine_epochs
        if steps is not None and steps != round(steps):
            return (
                f"refine_epochs={steps}: refine=natural counts steps of each block; give a whole "
                "number, or 0 to keep the start."
            )
        if self.resolved_method().iterations == 0 and steps != 0:
            return (
                f"refine=natural: {self.method} with iters=0 starts at B A = 0, which no "
                "natural-gradient step leaves. Choose refine=distill, or a method whose adapters "
                "correct the rounding, such as loftq or fast."
            )
        return ""

    def _check_allocation(self) -> str:
        if self.costs_by is not None:
            find_method(self.costs_by)
        if not self.allocation_row().measured:
            given = [key for key in ("candidates", "costs_by", "ranks") if getattr(self, key)]
            if given:
                return (
                    f"{given[0]}: allocation={self.allocation} goes by depth and has no costs to "
                    f"choose by. Choose one that measures: {', '.join(MEASURED)}."
                )
            return ""
        if self.format is not None or self.engine is not None:
            return (
                f"allocation={self.allocation}: chooses a format for each layer, so leave "
                f"{'format' if self.format is not None else 'engine'} out, or name the formats to "
                "choose from with candidates=..."
            )
        names = [str(spec) for spec in self.candidate_formats()]
        least = 1 if self.ranks else 2
        if len(set(names)) < least or len(set(names)) < len(names):
            return f"candidates={','.join(names)}: name two different formats or more."
        listed = ",".join(map(str, self.ranks))
        if self.ranks and (len(set(self.ranks)) < max(2, len(self.ranks)) or min(self.ranks) < 1):
            return f"ranks={listed}: name two different ranks or more, each at least 1."
        return ""

    def resolved_method(self) -> Method:
        """The method with this configuration's own choices put in."""
        method = find_method(self.method).with_options(
            refinement=self.refine,
            iterations=self.iters,
            solver=self.solver,
            order=self.order,
            damping=self.damping,
            metric_damping=self.damping,
            design_rank=self.design_rank,
        )
        if method.refined and method.needs == "none":  # statistics come with the text, for records
            return method.with_options(needs="diagonal")
        return method

    def refinement(self) -> Refinement:
        """What gradients do to the adapters, with this configuration's own choices put in."""
        return find_refinement(self.resolved_method().refinement).with_epochs(self.refine_epochs)

    def allocation_row(self) -> Allocation:
        """The row of the table of allocations."""
        return ALLOCATIONS[self.allocation]

    @property
    def text_reader(self) -> str:
        """The choice that looks at `data`, as key=value; "" where nothing does."""
        if find_method(self.method).needs != "none":
            return f"method={self.method}"
        if self.resolved_method().refined:
            return f"refine={self.refine}"
        row = self.allocation_row()
        if row.reads_text:
            return f"allocation={row.name}"
        if row.measured and self.cost_config().resolved_method().needs != "none":
            return f"costs_by={self.costs_by}"
        return ""

    def cost_config(self) -> QuantizeConfig:
        """The same choices with the method that costs are taken from, and nothing measured.

        Costs are those of the start: a refinement moves all adapters together.
        """
        return replace(
            self,
            method=self.costs_by or self.method,
            allocation="first",
            candidates=(),
            ranks=(),
            costs_by=None,
            refine="none",
        )

    def candidate_formats(self) -> tuple[FormatSpec, ...]:
        """What a measured allocation chooses from, the narrowest first unless named otherwise."""
        if self.candidates:
            return tuple(parse_format(name) for name in self.candidates)
        return tuple(self._as_prescribed(BITS_FORMATS[bits]) for bits in sorted(BITS_FORMATS))

    @property
    def all_ranks(self) -> tuple[int, ...]:
        """Ranks that a layer may get."""
        return self.ranks or (self.rank,)

    def default_format(self) -> FormatSpec:
        """Format of a layer that nothing else assigns."""
        if self.format is not None:
            return parse_format(self.format)
        if self.engine is not None:
            return parse_format(ENGINE_FORMATS[self.engine])
        whole = int(self.bits) if self.bits == int(self.bits) else 2
        return self._as_prescribed(BITS_FORMATS[whole])

    def wide_format(self) -> FormatSpec:
        """Format of the first blocks when `bits` is a fraction."""
        return self._as_prescribed(BITS_FORMATS[4])

    @property
    def tables(self) -> frozenset[str]:
        """What is packed without an adapter: embedding, head."""
        return frozenset(key for key in ("embedding", "head") if getattr(self, key) == 8)

    def table_format(self) -> FormatSpec:
        """Format of an embedding or head that is packed without an adapter."""
        return parse_format(TABLE_FORMAT)

    def _as_prescribed(self, name: str) -> FormatSpec:
        """The format behind a width, in the grid and coding that the method prescribes."""
        spec, method = parse_format(name), find_method(self.method)
        return replace(
            spec,
            grid=method.grid or spec.grid,
            scale_coding=method.scale_coding or spec.scale_coding,
        )

    @property
    def scaling(self) -> float:
        """The factor before B A, of every layer: one of another rank gets another alpha."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def to_dict(self) -> dict[str, object]:
        """JSON-ready, with a version."""
        return {"version": CONFIG_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> QuantizeConfig:
        """Inverse of to_dict.

        Raises:
            ValueError: a version or key this release does not know.
        """
        values = dict(values)
        version = values.pop("version", CONFIG_VERSION)
        if version != CONFIG_VERSION:
            raise ValueError(f"config version {version} is not {CONFIG_VERSION}: update loftq.")
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(unknown_option(unknown[0]))
        for key in ("targets", "skip", "candidates", "ranks"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])  # type: ignore[arg-type]
        return cls(**values)  # type: ignore[arg-type]


def unknown_option(name: str) -> str:
    """Message for an option that does not exist, with the nearest one that does."""
    import difflib

    known = [f.name for f in fields(QuantizeConfig)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"unknown option {name!r}. {hint}Known: {', '.join(known)}."
