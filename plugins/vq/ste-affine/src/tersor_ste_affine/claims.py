"""What the paper claims, in one autoencoder trained alike for all quantizers, three seeds."""

from __future__ import annotations

from collections.abc import Iterator

from tersor.evidence import Row, claim
from tersor_kit_vq.contest import compared, plain, trials

_NONE = "affine=none,inner=0,nu=0,alpha=5"  # the paper's VQ-VAE with a codebook loss
_PARTS = {
    "affine codes": "affine=learned,inner=0,nu=0,alpha=2",
    "alternated optimisation": "affine=none,inner=1,nu=0,alpha=5",
    "synchronised gradient": "affine=none,inner=0,nu=2,alpha=5",
}


def _ours(settings: str = "", bits: int = 10) -> str:
    return ",".join(filter(None, (f"ste-affine:codes={2**bits},dim=32", settings)))


@claim("all three changes: less reconstruction error and more codes in use than vq-vae")
def together(seed: int) -> Iterator[Row]:
    """Beside vq-vae (moving averages), and beside the same layer without the three changes (the paper's baseline: a codebook loss)."""
    ours = trials(_ours(), seed=seed)
    sides = {"vq-vae": trials(plain(10), seed=seed), "the same without the three": trials(_ours(_NONE), seed=seed)}
    for name, theirs in sides.items():
        yield from compared(f"less reconstruction error than {name}", "mse", ours, theirs, "lower")
        yield from compared(f"higher perplexity than {name}", "perplexity", ours, theirs, "higher")
        yield from compared(f"more of 1024 codes used than {name}", "use", ours, theirs, "higher")


@claim("each change alone: less reconstruction error and higher perplexity than without any")
def ablation(seed: int) -> Iterator[Row]:
    theirs = trials(_ours(_NONE), seed=seed)
    for part, settings in _PARTS.items():
        ours = trials(_ours(settings), seed=seed)
        yield from compared(f"{part} alone: less reconstruction error", "mse", ours, theirs, "lower")
        yield from compared(f"{part} alone: higher perplexity", "perplexity", ours, theirs, "higher")
