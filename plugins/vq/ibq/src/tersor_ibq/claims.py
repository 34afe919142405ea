"""What the paper claims, in one autoencoder trained alike for all quantizers, three seeds."""

from __future__ import annotations

from collections.abc import Iterator

from tersor.evidence import Row, claim
from tersor_kit_vq.contest import Protocol, compared, plain, trials


@claim("with the gradient through the index the codebook is used however large, and reconstruction does not suffer")
def codebook_use(seed: int) -> Iterator[Row]:
    """At 2^10 codes in the whole training, and at 2^13 in one of 400 steps, each beside a codebook of moving averages trained as long."""
    for bits, protocol in ((10, Protocol()), (13, Protocol(steps=400, prior_steps=0))):
        ours, theirs = trials(f"ibq:codes={2**bits},dim=32", protocol, seed), trials(plain(bits), protocol, seed)
        yield from compared(f"more of {2**bits} codes used than of vq-vae's", "use", ours, theirs, "higher", margin=0.1)
        yield from compared(f"most of {2**bits} codes used", "use", ours, 0.8, "higher", name="four of five")
        yield from compared(f"less reconstruction error than vq-vae, {2**bits} codes", "mse", ours, theirs, "lower")


@claim("the entropy penalty is what spreads the vectors over the codes")
def entropy_penalty(seed: int) -> Iterator[Row]:
    """With it, beside the same layer without."""
    ours, theirs = (trials(f"ibq:codes=1024,dim=32{x}", seed=seed) for x in ("", ",entropy=0.0"))
    yield from compared("more codes used with the entropy penalty than without", "use", ours, theirs, "higher", margin=0.1)
    yield from compared("less reconstruction error with the entropy penalty than without", "mse", ours, theirs, "lower")


@claim("trained longer, more of a large codebook is used")
def longer(seed: int) -> Iterator[Row]:
    """8,192 codes, 2,000 steps in place of 400, one seed."""
    protocol, name = Protocol(steps=2000, prior_steps=0), "ibq:codes=8192,dim=32"
    ours, theirs = trials(name, protocol, seed, 1), trials(plain(13), protocol, seed, 1)
    short = trials(name, Protocol(steps=400, prior_steps=0), seed, 1)
    yield from compared(
        "more of 8192 codes used after 2,000 steps than after 400", "use", ours, short, "higher", margin=0.1, name="400 steps"
    )
    yield from compared("most of 8192 codes used after 2,000 steps", "use", ours, 0.8, "higher", name="four of five")
    yield from compared("more of 8192 codes used than of vq-vae's, 2,000 steps each", "use", ours, theirs, "higher", margin=0.1)
    yield from compared("less reconstruction error than vq-vae, 8192 codes, 2,000 steps each", "mse", ours, theirs, "lower")
