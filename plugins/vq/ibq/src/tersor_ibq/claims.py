"""What the paper claims, in one autoencoder trained alike for all quantizers, three seeds."""

from __future__ import annotations

from collections.abc import Iterator

from tersor.evidence import Row, claim
from tersor_kit_vq.contest import MOST, Protocol, codes_in_use, compared, plain, trained_longer, trials


@claim("with the gradient through the index the codebook is used however large, and reconstruction does not suffer")
def codebook_use(seed: int) -> Iterator[Row]:
    """At 2^10 codes in the whole training, and at 2^13 in one of 400 steps, each beside a codebook of moving averages trained as long."""
    for bits, protocol in ((10, Protocol()), (13, Protocol(steps=400, prior_steps=0))):
        ours, theirs = trials(f"ibq:codes={2**bits},dim=32", protocol, seed), trials(plain(bits), protocol, seed)
        yield from codes_in_use(2**bits, ours, theirs, MOST)


@claim("the entropy penalty is what spreads the vectors over the codes")
def entropy_penalty(seed: int) -> Iterator[Row]:
    """With it, beside the same layer without."""
    ours, theirs = (trials(f"ibq:codes=1024,dim=32{x}", seed=seed) for x in ("", ",entropy=0.0"))
    yield from compared("more codes used with the entropy penalty than without", "use", ours, theirs, "higher", margin=0.1)
    yield from compared("less reconstruction error with the entropy penalty than without", "mse", ours, theirs, "lower")


@claim("trained longer, more of a large codebook is used")
def longer(seed: int) -> Iterator[Row]:
    """8,192 codes, 2,000 steps in place of 400, one seed."""
    return trained_longer("ibq:codes=8192,dim=32", 13, 2000, Protocol(steps=400, prior_steps=0), seed, MOST)
