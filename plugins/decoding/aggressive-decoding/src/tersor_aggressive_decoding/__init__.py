"""AggressiveDecoding for Tersor."""

from tersor import hookimpl
from tersor_aggressive_decoding.aggressive import AggressiveDecoding

__all__ = ["AggressiveDecoding"]


@hookimpl
def tersor_decoder() -> type[AggressiveDecoding]:
    return AggressiveDecoding
