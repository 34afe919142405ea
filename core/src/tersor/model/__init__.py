"""Whole networks: load them, compress them block by block, restore them, measure them. Needs ``pip install tersor[model]``."""

from __future__ import annotations

from tersor.model.driver import compress_model, plan_model, quantize, restore_model
from tersor.model.loading import load_compressed, load_model
from tersor.model.measure import generate, perplexity, token_ids
from tersor.model.recipe import Recipe
from tersor.model.source import TransformersSource

__all__ = [
    "Recipe",
    "TransformersSource",
    "compress_model",
    "generate",
    "load_compressed",
    "load_model",
    "perplexity",
    "plan_model",
    "quantize",
    "restore_model",
    "token_ids",
]
