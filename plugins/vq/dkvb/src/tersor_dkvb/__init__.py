"""The discrete key-value bottleneck for Tersor."""

from tersor import hookimpl
from tersor_dkvb.dkvb import DKVB, DKVBLayer, KeyValueBottleneck

__all__ = ["DKVB", "DKVBLayer", "KeyValueBottleneck"]


@hookimpl
def tersor_quantizer() -> type[DKVB]:
    return DKVB
