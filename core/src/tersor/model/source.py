"""A transformers causal language model as a source that decoders draw from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tersor.errors import InputError
from tersor.io import _library


class _CachedSession:
    """A growing sequence with the model's key-value cache, which is cropped when the session is rewound."""

    def __init__(self, source: TransformersSource) -> None:
        transformers = _library("transformers", "transformers", "decoding with a transformers model")
        self.source, self.length, self.calls = source, 0, 0
        self.cache = transformers.DynamicCache()  # without window: it is cropped freely, and the mask keeps the window

    def extend(self, tokens: Sequence[int], last: int | None = None) -> np.ndarray:
        import torch

        if len(tokens) == 0:
            raise InputError("extend needs at least one token")
        limit = getattr(self.source.model.config, "max_position_embeddings", None)
        if limit and self.length + len(tokens) > limit:
            raise InputError(f"{self.length + len(tokens)} tokens; allowed: the model's {limit} positions")
        ids = torch.tensor([list(tokens)], dtype=torch.long)
        keep = {} if last is None else {"logits_to_keep": last}
        with torch.inference_mode():
            out = self.source.model(ids, past_key_values=self.cache, use_cache=True, **keep)
        self.length += len(tokens)
        self.calls += 1
        self.source.calls += 1
        logits: np.ndarray = out.logits[0].float().numpy()
        return logits

    def rewind(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise InputError(f"rewind to {length}; allowed: 0 to {self.length}")
        if length < self.length:
            self.cache.crop(length - self.length)  # negative: so many tokens less
            self.length = length


class TransformersSource:
    """A transformers causal language model (evaluation mode, on the CPU) with its key-value cache.

    ``stop``: token numbers that end the output; default: the model's own end-of-sequence tokens.
    Raises :class:`tersor.InputError` where the object is not such a model.
    """

    def __init__(self, model: Any, stop: Iterable[int] | None = None) -> None:
        if not hasattr(model, "config") or not callable(model) or not hasattr(model.config, "vocab_size"):
            raise InputError(
                f"a decoder draws from a tersor.Source or a transformers causal language model; given: {type(model).__name__}"
            )
        self.model = model.eval()
        self.vocabulary = int(model.config.vocab_size)
        self.calls = 0
        if stop is None:
            own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
            own = getattr(model.config, "eos_token_id", None) if own is None else own
            stop = [] if own is None else [own] if isinstance(own, int) else own
        self.stop = frozenset(int(t) for t in stop)

    def open(self) -> _CachedSession:
        """A new, empty session."""
        return _CachedSession(self)
