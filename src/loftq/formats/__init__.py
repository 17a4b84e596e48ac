"""What a quantized weight is: codebooks, grids, scales, packing, and the names of formats."""

from loftq.formats.basis import decoded_dtype, from_stored_basis, to_stored_basis
from loftq.formats.grids import FITS, Grid, default_fit, fits_of, grid_of
from loftq.formats.packing import pack_codes, unpack_codes
from loftq.formats.scales import decode_scales, encode_scales, round_trip_scales
from loftq.formats.spec import FormatSpec, component_shapes, known_formats, parse_format
from loftq.formats.tensor import COMPONENTS, QuantizedTensor

__all__ = [
    "COMPONENTS",
    "FITS",
    "FormatSpec",
    "Grid",
    "QuantizedTensor",
    "component_shapes",
    "decode_scales",
    "decoded_dtype",
    "default_fit",
    "encode_scales",
    "fits_of",
    "from_stored_basis",
    "grid_of",
    "known_formats",
    "pack_codes",
    "parse_format",
    "round_trip_scales",
    "to_stored_basis",
    "unpack_codes",
]
