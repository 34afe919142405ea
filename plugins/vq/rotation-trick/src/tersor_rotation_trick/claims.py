"""What the paper claims, in one autoencoder trained alike for all quantizers, three seeds."""

from __future__ import annotations

from collections.abc import Iterator

import tersor
from tersor.evidence import Row, claim
from tersor_kit_vq.contest import compared, plain, trials


@claim("rotated gradients bring vectors nearer to their codes, use more codes and reconstruct better than straight-through ones")
def rotated(seed: int) -> Iterator[Row]:
    """The same codebook, moving averages and losses, with 2^10 codes; then as in the paper's experiments, decay 0.8 and commitment 1."""
    for label, settings in (("", {}), (", decay 0.8 and commitment 1", {"decay": 0.8, "commitment": 1.0})):
        theirs = (
            tersor.quantizer("vq-vae", codes=1024, dim=32, encoder="none", prior="none", **settings) if settings else plain(10)
        )
        ours = tersor.quantizer("rotation-trick", codes=1024, dim=32, **settings)
        rows, others = trials(ours, seed=seed), trials(theirs, seed=seed)
        yield from compared(f"less quantization error than straight-through{label}", "error", rows, others, "lower")
        yield from compared(f"more codes used than straight-through{label}", "use", rows, others, "higher")
        yield from compared(f"less reconstruction error than straight-through{label}", "mse", rows, others, "lower")
