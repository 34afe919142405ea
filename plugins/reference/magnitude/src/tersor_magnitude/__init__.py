"""Magnitude for Tersor."""

from tersor import hookimpl
from tersor_magnitude.magnitude import Magnitude

__all__ = ["Magnitude"]


@hookimpl
def tersor_pruner() -> type[Magnitude]:
    return Magnitude
