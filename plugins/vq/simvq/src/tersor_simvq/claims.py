"""What the paper claims, in one autoencoder trained alike for all quantizers, three seeds."""

from __future__ import annotations

from collections.abc import Iterator

from tersor.evidence import Row, claim
from tersor_kit_vq.contest import Protocol, codes_in_use, compared, plain, trained_longer, trials


@claim("with one linear layer the whole codebook is used, however large, and vectors are nearer to their codes")
def codebook_use(seed: int) -> Iterator[Row]:
    """At 2^10 and 2^13 codes, beside a codebook of moving averages with as many."""
    for bits in (10, 13):
        ours, theirs = trials(f"simvq:codes={2**bits},dim=32", seed=seed), trials(plain(bits), seed=seed)
        yield from codes_in_use(2**bits, ours, theirs)
        yield from compared(f"less quantization error than vq-vae, {2**bits} codes", "error", ours, theirs, "lower")


@claim("trained longer, more of a large codebook is used")
def longer(seed: int) -> Iterator[Row]:
    """8,192 codes, 4,000 steps in place of 1,000, one seed."""
    return trained_longer("simvq:codes=8192,dim=32", 13, 4000, Protocol(), seed)
