"""What compression did to a language model: perplexity, and text that it writes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tersor.errors import InputError
from tersor.progress import track


def token_ids(tokenizer: Any, text: str, limit: int | None = None) -> Any:
    """The text's tokens as a 1-D int64 tensor, the first ``limit`` of them; no token is added."""
    import torch

    if limit is not None:
        text = text[: limit * 12]  # a token is seldom longer than a dozen characters
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[:limit], dtype=torch.long)


def perplexity(model: Any, ids: Any, window: int = 1024) -> float:
    """exp of the mean negative log likelihood over non-overlapping windows; ``ids``: 1-D token numbers.

    Each window of ``window`` tokens predicts the token after each of its positions, so n tokens give n - 1 targets. Raises
    :class:`tersor.InputError` for fewer than two tokens.
    """
    import torch

    ids = torch.as_tensor(np.asarray(ids), dtype=torch.long)
    if ids.ndim != 1 or len(ids) < 2:
        raise InputError(f"perplexity needs at least two tokens in one row; given: shape {tuple(ids.shape)}")
    total, count = 0.0, len(ids) - 1
    with torch.no_grad():
        for start in track(range(0, count, window), "perplexity"):
            stop = min(start + window, count)
            logits = model(ids[None, start:stop]).logits[0].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[start + 1 : stop + 1], reduction="sum"))
    return math.exp(min(total / count, 700.0))


def generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 24) -> str:
    """A greedy continuation of ``prompt``, as text."""
    import torch

    ids = token_ids(tokenizer, prompt)[None]
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            use_cache=True,
        )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
