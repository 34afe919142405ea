"""Greedy decoding, the baseline of exact decoders."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor import Decoded, Decoder, method


@method
class Greedy(Decoder):
    """The most probable token at every step; one model call a token, the prompt in the first.

    Source: any :class:`tersor.Source` or transformers causal language model. Ends at ``max_new_tokens`` or after a token of
    ``source.stop``. Raises :class:`tersor.InputError` for a prompt that is not a list of the source's tokens.
    """

    name = "greedy"
    exact = "greedy"

    def _decode(self, source: Any, prompt: list[int], budget: int, **options: Any) -> Decoded:
        session = source.open()
        logits = session.extend(prompt, last=1)
        out: list[int] = []
        while True:
            token = int(np.argmax(logits[-1]))
            out.append(token)
            if len(out) == budget or token in source.stop:
                return Decoded(np.array(out), calls=session.calls, steps=len(out))
            logits = session.extend([token])
