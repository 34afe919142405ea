"""GradualMagnitude for Tersor."""

from tersor import hookimpl
from tersor_gradual_magnitude.gradual import GradualMagnitude

__all__ = ["GradualMagnitude"]


@hookimpl
def tersor_pruner() -> type[GradualMagnitude]:
    return GradualMagnitude
