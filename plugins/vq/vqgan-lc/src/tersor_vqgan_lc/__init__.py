"""VQGAN-LC for Tersor."""

from tersor import hookimpl
from tersor_vqgan_lc.vqgan_lc import VQGANLC, VQGANLCLayer

__all__ = ["VQGANLC", "VQGANLCLayer"]


@hookimpl
def tersor_quantizer() -> type[VQGANLC]:
    return VQGANLC
