"""The compressed-tensors exporter for Tersor."""

from tersor import hookimpl
from tersor_compressed_tensors.exporter import CompressedTensors

__all__ = ["CompressedTensors"]


@hookimpl
def tersor_exporter() -> type[CompressedTensors]:
    return CompressedTensors
