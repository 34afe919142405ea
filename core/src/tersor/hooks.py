"""The hook specs: one for each kind of method, one for exporters, and one that operations pass through.

A plugin module implements the hook of each kind that it offers::

    from tersor import hookimpl

    @hookimpl
    def tersor_codec():
        return MyCodec

Hook specs only ever gain arguments; an implementation takes those that it wants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from tersor.exporters import Exporter
    from tersor.kinds import Codec, Decoder, Method, Pruner, Quantizer

hookspec = pluggy.HookspecMarker("tersor")
hookimpl = pluggy.HookimplMarker("tersor")


@hookspec(firstresult=True)
def tersor_codec(name: str) -> type[Codec] | None:
    """The codec class that the entry point ``name`` of the group ``tersor.codec`` stands for."""


@hookspec(firstresult=True)
def tersor_quantizer(name: str) -> type[Quantizer] | None:
    """The quantizer class that the entry point ``name`` of the group ``tersor.quantizer`` stands for."""


@hookspec(firstresult=True)
def tersor_pruner(name: str) -> type[Pruner] | None:
    """The pruner class that the entry point ``name`` of the group ``tersor.pruner`` stands for."""


@hookspec(firstresult=True)
def tersor_decoder(name: str) -> type[Decoder] | None:
    """The decoder class that the entry point ``name`` of the group ``tersor.decoder`` stands for."""


@hookspec(firstresult=True)
def tersor_exporter(name: str) -> type[Exporter] | None:
    """The exporter class that the entry point ``name`` of the group ``tersor.exporter`` stands for."""


@hookspec(firstresult=True)
def tersor_operation(operation: str, method: Method | Exporter, call: Callable[[], Any]) -> Any:
    """Run one operation of a method: ``encode``, ``decode``, ``quantize``, ``dequantize``, ``prune``, ``apply``, ``fit``; ``export``
    of an exporter.

    Core's own implementation returns ``call()``. An extension (entry-point group ``tersor.extension``) wraps it with
    ``@hookimpl(wrapper=True)`` to time, log or post-process every operation of every method.
    """
