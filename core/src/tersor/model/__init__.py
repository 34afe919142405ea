"""Whole networks: load them, compress them block by block, restore them, measure them. Needs ``pip install tersor[model]``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tersor.model.driver import compress_model, plan_model, quantize, restore_model
from tersor.model.loading import load_compressed, load_model
from tersor.model.measure import generate, perplexity, token_ids
from tersor.model.modules import (
    CompressedLayer,
    CompressedTensor,
    compress_layers,
    describe,
    load_layers,
    module,
    place_layers,
    save_layers,
    skeleton,
)
from tersor.model.packed import pack_layers
from tersor.model.recipe import Recipe
from tersor.model.reduction import TokenReduction
from tersor.model.source import TransformersSource
from tersor.model.statistics import View

if TYPE_CHECKING:
    from tersor.model.cache import KVCache

__all__ = [
    "CompressedLayer",
    "CompressedTensor",
    "KVCache",
    "Recipe",
    "TokenReduction",
    "TransformersSource",
    "View",
    "compress_layers",
    "compress_model",
    "describe",
    "generate",
    "load_compressed",
    "load_layers",
    "load_model",
    "module",
    "pack_layers",
    "perplexity",
    "place_layers",
    "plan_model",
    "quantize",
    "restore_model",
    "save_layers",
    "skeleton",
    "token_ids",
]


def __getattr__(name: str) -> Any:
    if name == "KVCache":  # derives from a class of transformers, which takes seconds to import
        from tersor.model.cache import KVCache

        return KVCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
