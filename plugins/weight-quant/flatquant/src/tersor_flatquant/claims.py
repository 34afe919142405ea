"""The paper's claims on SmolLM2-135M with weights, activations and attention cache at 4 bits: below no transform, and below Hadamard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tersor.evidence import Row, claim
from tersor_kit_weight_quant.judge import Judge

WINDOWS = 12  # of 512 tokens, to calibrate with
CASES = (
    ("no transform", "flatquant:transform=none"),
    ("random Hadamard rotations", "flatquant:transform=hadamard"),
)


class CacheJudge(Judge):
    """A judge whose networks keep their keys and values in the method's own cache."""

    def _perplexity(self, model: Any, text: str) -> float:
        from tersor.model import perplexity
        from tersor_flatquant.cache import FlatCache

        def call(ids: Any) -> Any:
            return model(ids, past_key_values=FlatCache(model))

        return perplexity(call, self.tests[text], window=1024)


@claim("weights, activations and attention cache at 4 bits: perplexity below the same quantizers without learned transforms")
def perplexity(seed: int) -> Iterator[Row]:
    """Weights for each output channel, inputs for each token, keys and values for each token and head, all rounded to 4 bits.

    The baselines have the same quantizers, and clip search in the place of learned thresholds.
    """
    judge = CacheJudge(seed, batches=WINDOWS)
    ours = judge("flatquant", layers=True)
    for words, name in CASES:
        yield from judge.rows(
            f"4 bits for weights, activations and cache: below {words}", ours, judge(name, layers=True),
            note=f"{WINDOWS} windows of 512 tokens and one pass over them, where the paper has 128 of 2048 and 15",
        )  # fmt: skip
