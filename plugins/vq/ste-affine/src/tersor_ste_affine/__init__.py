"""Affine codebooks, alternated optimisation and synchronised gradients for Tersor."""

from tersor import hookimpl
from tersor_ste_affine.ste_affine import Affine, STEAffine, STEAffineLayer

__all__ = ["Affine", "STEAffine", "STEAffineLayer"]


@hookimpl
def tersor_quantizer() -> type[STEAffine]:
    return STEAffine
