"""What the paper claims, in one autoencoder trained alike for all quantizers, three seeds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tersor
from tersor.evidence import Row, claim
from tersor_kit_vq.contest import compared, plain, trials


def _distances(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the mean of (e - q)^2 too, without a division by the variance of e."""
    return [{k: {**v, "distance": v["error"] * v["spread"]} if isinstance(v, dict) else v for k, v in r.items()} for r in rows]


@claim("rotated gradients bring vectors nearer to their codes, use more codes and reconstruct better than straight-through ones")
def rotated(seed: int) -> Iterator[Row]:
    """The same codebook, moving averages and losses, with 2^10 codes; then as in the paper's experiments, decay 0.8 and commitment 1."""
    for label, settings in (("", {}), (", decay 0.8 and commitment 1", {"decay": 0.8, "commitment": 1.0})):
        theirs = (
            tersor.quantizer("vq-vae", codes=1024, dim=32, encoder="none", prior="none", **settings) if settings else plain(10)
        )
        ours = tersor.quantizer("rotation-trick", codes=1024, dim=32, **settings)
        rows, others = _distances(trials(ours, seed=seed)), _distances(trials(theirs, seed=seed))
        yield from compared(
            f"less quantization error than straight-through, as the paper measures it{label}", "distance", rows, others, "lower",
            metric="mean squared error of the vectors",
        )  # fmt: skip
        yield from compared(
            f"less quantization error than straight-through, relative to the variance{label}", "error", rows, others, "lower"
        )
        yield from compared(f"more codes used than straight-through{label}", "use", rows, others, "higher")
        yield from compared(f"less reconstruction error than straight-through{label}", "mse", rows, others, "lower")
