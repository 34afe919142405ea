"""Latent quantization for Tersor."""

from tersor import hookimpl
from tersor_qlae.infomec import InfoMEC, explicitness, infomec, normalized_information
from tersor_qlae.qlae import WEIGHT_DECAY, Qlae, QLAELayer, parameter_groups

__all__ = [
    "InfoMEC",
    "QLAELayer",
    "Qlae",
    "WEIGHT_DECAY",
    "explicitness",
    "infomec",
    "normalized_information",
    "parameter_groups",
]


@hookimpl
def tersor_quantizer() -> type[Qlae]:
    return Qlae
