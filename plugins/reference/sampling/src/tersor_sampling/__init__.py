"""Sampling for Tersor."""

from tersor import hookimpl
from tersor_sampling.sampling import Sampling

__all__ = ["Sampling"]


@hookimpl
def tersor_decoder() -> type[Sampling]:
    return Sampling
