"""What the weight quantizers of Tersor share: bit packing, groupwise grids, Hessian error feedback."""

from tersor_kit_weight_quant.columns import round_columns
from tersor_kit_weight_quant.grid import CLIP_RATIOS, Grid, exponent_of, fit_grid, fit_scale, group_count, load, normalise, store
from tersor_kit_weight_quant.hadamard import Rotation
from tersor_kit_weight_quant.hessian import feedback, gram, unit_factor
from tersor_kit_weight_quant.packing import pack, packed_size, unpack
from tersor_kit_weight_quant.sparse import load_sparse, pack_wide, store_sparse, unpack_wide

__all__ = [
    "CLIP_RATIOS",
    "Grid",
    "Rotation",
    "exponent_of",
    "feedback",
    "fit_grid",
    "fit_scale",
    "gram",
    "group_count",
    "load",
    "load_sparse",
    "normalise",
    "pack",
    "pack_wide",
    "packed_size",
    "round_columns",
    "store",
    "store_sparse",
    "unit_factor",
    "unpack",
    "unpack_wide",
]
