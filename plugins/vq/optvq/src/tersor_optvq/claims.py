"""What the paper claims, in one autoencoder trained alike for all quantizers, three seeds."""

from __future__ import annotations

from collections.abc import Iterator

from tersor.evidence import Row, claim
from tersor_kit_vq.contest import Protocol, codes_in_use, plain, trials

FEWER = Protocol(steps=500, prior_steps=0)  # 2^13 codes cost five times as much a step as 2^10 do


@claim("with optimal transport nearly all codes are used, however many, and images are reconstructed better")
def codebook_use(seed: int) -> Iterator[Row]:
    """At 2^10 codes, and at 2^13 with half the steps, beside a codebook of moving averages with as many codes and steps."""
    for bits, protocol in ((10, Protocol()), (13, FEWER)):
        ours, theirs = trials(f"optvq:codes={2**bits},dim=32", protocol, seed), trials(plain(bits), protocol, seed)
        yield from codes_in_use(2**bits, ours, theirs)
