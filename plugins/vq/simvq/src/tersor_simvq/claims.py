"""What the paper claims, in one autoencoder trained alike for all quantizers, three seeds."""

from __future__ import annotations

from collections.abc import Iterator

from tersor.evidence import Row, claim
from tersor_kit_vq.contest import Protocol, compared, plain, trials


@claim("with one linear layer the whole codebook is used, however large, and vectors are nearer to their codes")
def codebook_use(seed: int) -> Iterator[Row]:
    """At 2^10 and 2^13 codes, beside a codebook of moving averages with as many."""
    for bits in (10, 13):
        ours, theirs = trials(f"simvq:codes={2**bits},dim=32", seed=seed), trials(plain(bits), seed=seed)
        yield from compared(f"more of {2**bits} codes used than of vq-vae's", "use", ours, theirs, "higher", margin=0.1)
        yield from compared(f"nearly all of {2**bits} codes used", "use", ours, 0.95, "higher", name="19 of 20")
        yield from compared(f"less reconstruction error than vq-vae, {2**bits} codes", "mse", ours, theirs, "lower")
        yield from compared(f"less quantization error than vq-vae, {2**bits} codes", "error", ours, theirs, "lower")


@claim("trained longer, more of a large codebook is used")
def longer(seed: int) -> Iterator[Row]:
    """8,192 codes, 4,000 steps in place of 1,000, one seed."""
    protocol, name = Protocol(steps=4000, prior_steps=0), "simvq:codes=8192,dim=32"
    ours, theirs = trials(name, protocol, seed, 1), trials(plain(13), protocol, seed, 1)
    short = trials(name, seed=seed, count=1)
    yield from compared(
        "more of 8192 codes used after 4,000 steps than after 1,000", "use", ours, short, "higher", margin=0.1, name="1,000 steps"
    )
    yield from compared("nearly all of 8192 codes used after 4,000 steps", "use", ours, 0.95, "higher", name="19 of 20")
    yield from compared("more of 8192 codes used than of vq-vae's, 4,000 steps each", "use", ours, theirs, "higher", margin=0.1)
    yield from compared("less reconstruction error than vq-vae, 8192 codes, 4,000 steps each", "mse", ours, theirs, "lower")
