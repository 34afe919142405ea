"""What the weight quantizers of Tersor share: bit packing, groupwise grids, Hessian error feedback."""

from tersor_kit_weight_quant.columns import round_columns
from tersor_kit_weight_quant.descent import damped, descend, quadratic
from tersor_kit_weight_quant.grid import CLIP_RATIOS, Grid, exponent_of, fit_grid, fit_scale, group_count, load, normalise, store
from tersor_kit_weight_quant.hadamard import Rotation
from tersor_kit_weight_quant.hessian import feedback, gram, ldl, unit_factor
from tersor_kit_weight_quant.int8 import Int8Linear, Int8Matrix, absmax
from tersor_kit_weight_quant.packing import pack, packed_size, unpack
from tersor_kit_weight_quant.sparse import load_sparse, pack_wide, store_sparse, unpack_wide
from tersor_kit_weight_quant.vq import (
    block_factor,
    collect,
    exponent_of_codebook,
    fit_codebooks,
    from_int8,
    kmeans,
    lookup,
    mahalanobis_seeds,
    nearest,
    pack_order,
    to_int8,
    unpack_order,
)

__all__ = [
    "CLIP_RATIOS",
    "Grid",
    "Int8Linear",
    "Int8Matrix",
    "Rotation",
    "absmax",
    "block_factor",
    "damped",
    "descend",
    "exponent_of",
    "exponent_of_codebook",
    "feedback",
    "fit_codebooks",
    "fit_grid",
    "fit_scale",
    "from_int8",
    "gram",
    "group_count",
    "kmeans",
    "ldl",
    "load",
    "load_sparse",
    "mahalanobis_seeds",
    "nearest",
    "normalise",
    "pack",
    "pack_order",
    "pack_wide",
    "packed_size",
    "collect",
    "round_columns",
    "quadratic",
    "store",
    "store_sparse",
    "lookup",
    "to_int8",
    "unit_factor",
    "unpack",
    "unpack_order",
    "unpack_wide",
]
