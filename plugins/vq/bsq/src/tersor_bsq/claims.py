"""What the paper claims, in one autoencoder trained alike for all quantizers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tersor
from tersor.evidence import Row, claim
from tersor_kit_vq import bit_groups, codebook_entropy
from tersor_kit_vq.contest import PHOTOGRAPHS, SEEDS, Protocol, bits_in_use, compared, pictures, plain, seeds_row, trained, trials

_NATS = 1.4426950408889634  # bits


@claim(
    "codes of bits are all in use, their joint entropy is near their length, and images come back as from a codebook of as many bits"
)
def codebook_use(seed: int) -> Iterator[Row]:
    """At 10 and 13 bits a vector, beside a codebook of moving averages with as many."""
    for bits in (10, 13):
        yield from bits_in_use(f"bsq:bits={bits},dim=32", bits, seed)


@claim("a heavier entropy penalty brings the codes' joint entropy nearer to their length")
def penalty(seed: int) -> Iterator[Row]:
    """Ten times the default weight, 10 bits a vector."""
    ours, default = trials("bsq:bits=10,dim=32,entropy=1.0", seed=seed), trials("bsq:bits=10,dim=32", seed=seed)
    yield from compared("joint entropy at entropy=1 above that at 0.1, 10 bits", "order0", ours, default, "higher")
    yield from compared("joint entropy at entropy=1 above 0.9 of 10 bits", "order0", ours, 9.0, "higher", name="0.9 of 10 bits")
    yield from compared(
        "less reconstruction error than vq-vae at entropy=1, 10 bits", "mse", ours, trials(plain(10), seed=seed), "lower"
    )


def _hard(bits: torch.Tensor, groups: list[int]) -> float:
    """Entropy of signs (bool N x L) in bits, summed over groups."""
    odds = torch.where(bits, 100.0, -100.0)
    return float(codebook_entropy(odds, groups)) * _NATS


@torch.no_grad()
def _measured(seed: int) -> dict[str, float]:
    """Bits, of one training at 14 bits a vector: entropies over the held-out photographs, and of their files."""
    method = tersor.quantizer("bsq", bits=14, dim=32, prior="autoregressive", steps=600)
    network, layer = trained(method, seed, Protocol())
    latents = [network.encode(image[None]) for image in pictures()[1][PHOTOGRAPHS]]
    u = torch.cat([layer.sphere(z.flatten(0, 2)) for z in latents])
    bits, odds = u > 0, layer.odds(u)
    fitted = method.with_layer(layer, [network.encode(image[None]) for image in pictures()[0]])
    return {
        "a bit": _hard(bits, [1] * 14) / 14,
        **{f"soft {most}": float(codebook_entropy(odds, bit_groups(14, most))) * _NATS for most in (1, 9, 14)},
        **{f"hard {most}": _hard(bits, bit_groups(14, most)) for most in (1, 9, 14)},
        "files": sum(8 * fitted.quantize(z).nbytes for z in latents) / len(u),
    }


@claim("bits are balanced, the entropy by groups is near that over all codes, and the prior leaves fewer bits than there are")
def entropies_and_prior(seed: int) -> Iterator[Row]:
    """14 bits, three seeds; the prior learns on the training pictures, files are those of four held-out photographs."""
    found = [_measured(s) for s in range(seed, seed + len(SEEDS))]

    def row(title: str, metric: str, key: str, theirs: str | float, name: str, better: str = "lower", slack: float = 0.0) -> Row:
        other = theirs if isinstance(theirs, float) else [f[theirs] for f in found]
        return seeds_row(title, metric, [f[key] for f in found], other, better, name, slack=slack,
                         note="; four held-out photographs, 14 bits")  # fmt: skip

    yield row("the mean entropy of a bit is above 0.95", "bits", "a bit", 0.95, "0.95", "higher")
    for most in (9, 1):
        yield row(f"codebook entropy of the soft codes by groups of at most {most} within 0.1 bits of the exact one", "bits",
                  f"soft {most}", "soft 14", "over all 2^14 codes", slack=0.1)  # fmt: skip
        yield row(f"entropy of the codes themselves by groups of at most {most} within 1 bit of their joint entropy", "bits",
                  f"hard {most}", "hard 14", "joint entropy", slack=1.0)  # fmt: skip
    whole = "bits a vector, whole files"
    yield row("files by the learned prior have fewer bits than the codes", whole, "files", 14.0, "14 bits, without headers")
    yield row("files by the learned prior have fewer bits than the joint entropy of the codes", whole, "files", "hard 14",
              "joint entropy of the photographs' codes, table not counted")  # fmt: skip
