"""Tersor: a registry of compression methods, looked up by name.

``import tersor`` is cheap: nothing but this file runs until a name is used, and neither torch nor any plugin is imported before
the one method asked for.

>>> import tersor
>>> "zstd" in tersor.available()          # doctest: +SKIP
True
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "tersor.api": ["compress", "decompress", "inspect", "codec", "quantizer", "pruner", "decoder", "available", "info"],
    "tersor.jobs": ["compress_many", "decompress_many"],
    "tersor.config": ["field", "between", "one_of", "positive", "at_least", "method"],
    "tersor.domains": ["Audio", "Video", "Domain", "DOMAINS"],
    "tersor.exporters": ["Exported", "Exporter", "ExportModel", "ModelTensor", "export", "exporter"],
    "tersor.kinds": ["Codec", "Quantizer", "Pruner", "Decoder", "Method"],
    "tersor.stream": ["Stream"],
    "tersor.tokens": ["Kept", "TokenPruner"],
    "tersor.results": ["Payload", "Codes", "Mask", "Decoded", "Spec", "Calibration", "Uniform", "Source", "Session", "TreeSession", "branching"],
    "tersor.hooks": ["hookimpl"],
    "tersor.progress": ["track"],
    "tersor.errors": [
        "TersorError", "ConfigError", "InputError", "CalibrationError", "ExportError", "UnknownMethodError", "ConflictError", "PluginError",
        "MissingLibraryError", "StateError", "MissingStateError", "FileError", "NotTersorFileError", "UnsupportedVersionError",
        "TruncatedFileError", "ChecksumError", "LimitError", "CorruptPayloadError", "ClaimError",
    ],
}  # fmt: skip
_HOME = {name: module for module, names in _WHERE.items() for name in names}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from tersor.api import available, codec, compress, decoder, decompress, info, inspect, pruner, quantizer
    from tersor.config import at_least, between, field, method, one_of, positive
    from tersor.domains import DOMAINS, Audio, Domain, Video
    from tersor.errors import (
        CalibrationError,
        ChecksumError,
        ClaimError,
        ConfigError,
        ConflictError,
        CorruptPayloadError,
        ExportError,
        FileError,
        InputError,
        LimitError,
        MissingLibraryError,
        MissingStateError,
        NotTersorFileError,
        PluginError,
        StateError,
        TersorError,
        TruncatedFileError,
        UnknownMethodError,
        UnsupportedVersionError,
    )
    from tersor.exporters import Exported, Exporter, ExportModel, ModelTensor, export, exporter
    from tersor.hooks import hookimpl
    from tersor.jobs import compress_many, decompress_many
    from tersor.kinds import Codec, Decoder, Method, Pruner, Quantizer
    from tersor.progress import track
    from tersor.results import Calibration, Codes, Decoded, Mask, Payload, Session, Source, Spec, TreeSession, Uniform, branching
    from tersor.stream import Stream
    from tersor.tokens import Kept, TokenPruner


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'tersor' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
