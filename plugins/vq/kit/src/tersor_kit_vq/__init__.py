"""What the vector quantizers share: search, k-means, codebooks, packing, an autoencoder of images, a prior of indices."""

from tersor_kit_vq.autoencoder import FACTOR, Autoencoder, crops, padded, three_channels, train
from tersor_kit_vq.bits import BitLayer, bit_groups, bit_sizes, bits_to_codes, codebook_entropy, codes_to_bits, token_entropy
from tersor_kit_vq.codebook import Codebook, Quantized, check_vectors, straight_through, together
from tersor_kit_vq.grids import from_grid, grid_shape, to_grid
from tersor_kit_vq.layers import (
    VectorLayer,
    VectorQuantizer,
    add_over_processes,
    bridge,
    fit_layer,
    layer_state,
    mean_square,
    move_bridges,
    unbridge,
)
from tersor_kit_vq.packing import index_bits, join, pack_indices, pack_mixed, split, unpack_indices, unpack_mixed
from tersor_kit_vq.plain import CodebookLayer
from tersor_kit_vq.prior import IndexPrior
from tersor_kit_vq.residual import invert, residual_codes, residual_values
from tersor_kit_vq.rotation import rotate_to
from tersor_kit_vq.search import kmeans, nearest, sums_by_code
from tersor_kit_vq.softmax import Posterior, likeliest, posterior
from tersor_kit_vq.standard import standard

__all__ = [
    "FACTOR",
    "Autoencoder",
    "BitLayer",
    "Codebook",
    "CodebookLayer",
    "IndexPrior",
    "Posterior",
    "Quantized",
    "VectorLayer",
    "VectorQuantizer",
    "add_over_processes",
    "bit_groups",
    "bit_sizes",
    "bits_to_codes",
    "bridge",
    "check_vectors",
    "codebook_entropy",
    "codes_to_bits",
    "crops",
    "fit_layer",
    "from_grid",
    "grid_shape",
    "index_bits",
    "invert",
    "join",
    "kmeans",
    "layer_state",
    "likeliest",
    "mean_square",
    "move_bridges",
    "nearest",
    "pack_indices",
    "pack_mixed",
    "padded",
    "posterior",
    "residual_codes",
    "residual_values",
    "rotate_to",
    "split",
    "standard",
    "straight_through",
    "sums_by_code",
    "three_channels",
    "to_grid",
    "together",
    "token_entropy",
    "train",
    "unbridge",
    "unpack_indices",
    "unpack_mixed",
]
