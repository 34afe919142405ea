"""The rotation trick for Tersor."""

from tersor import hookimpl
from tersor_rotation_trick.rotation_trick import RotationTrick, RotationTrickLayer

__all__ = ["RotationTrick", "RotationTrickLayer"]


@hookimpl
def tersor_quantizer() -> type[RotationTrick]:
    return RotationTrick
