"""What the paper claims, in one autoencoder trained alike for all quantizers, three seeds."""

from __future__ import annotations

from collections.abc import Iterator

from tersor.evidence import Row, claim
from tersor_kit_vq.contest import codes_in_use, plain, trials


@claim("codewords that move to encoded vectors are used, all of them, and images are reconstructed better")
def codebook_use(seed: int) -> Iterator[Row]:
    """At 2^10 and 2^13 codes, beside a codebook of moving averages with as many."""
    for bits in (10, 13):
        ours, theirs = trials(f"cvq-vae:codes={2**bits},dim=32", seed=seed), trials(plain(bits), seed=seed)
        yield from codes_in_use(2**bits, ours, theirs)
