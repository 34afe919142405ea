"""What the paper claims, in one autoencoder trained alike for all quantizers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tersor
from tersor.evidence import Row, claim
from tersor_kit_vq import bit_groups, codebook_entropy
from tersor_kit_vq.contest import PHOTOGRAPHS, Protocol, compared, pictures, plain, trained, trials

_NATS = 1.4426950408889634  # bits


@claim(
    "codes of bits are all in use, their joint entropy is near their length, and images come back as from a codebook of as many bits"
)
def codebook_use(seed: int) -> Iterator[Row]:
    """At 10 and 13 bits a vector, beside a codebook of moving averages with as many."""
    for bits in (10, 13):
        ours, theirs = trials(f"bsq:bits={bits},dim=32", seed=seed), trials(plain(bits), seed=seed)
        yield from compared(f"more of 2^{bits} codes used than of vq-vae's", "use", ours, theirs, "higher", margin=0.1)
        yield from compared(
            f"joint entropy above 0.9 of {bits} bits", "order0", ours, 0.9 * bits, "higher", name=f"0.9 of {bits} bits"
        )
        yield from compared(f"less reconstruction error than vq-vae, {bits} bits", "mse", ours, theirs, "lower")


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


@claim("bits are balanced, the entropy by groups is near that over all codes, and the prior leaves fewer bits than there are")
@torch.no_grad()
def entropies_and_prior(seed: int) -> Iterator[Row]:
    """14 bits, one training; the prior learns on the training pictures, files are those of four held-out photographs."""
    method = tersor.quantizer("bsq", bits=14, dim=32, prior="autoregressive", steps=600)
    network, layer = trained(method, seed, Protocol())
    latents = [network.encode(image[None]) for image in pictures()[1][PHOTOGRAPHS]]
    u = torch.cat([layer.sphere(z.flatten(0, 2)) for z in latents])
    bits, odds, many = u > 0, layer.odds(u), f"{len(u)} vectors of four held-out photographs, 14 bits"
    yield Row(claim="the mean entropy of a bit is above 0.95", metric="bits", ours=_hard(bits, [1] * 14) / 14, baseline=0.95,
              baseline_name="0.95", better="higher", note=many)  # fmt: skip
    exact = float(codebook_entropy(odds, [14])) * _NATS
    for most in (9, 1):
        ours = float(codebook_entropy(odds, bit_groups(14, most))) * _NATS
        yield Row(claim=f"codebook entropy of the soft codes by groups of at most {most} within 0.1 bits of the exact one", metric="bits",
                  ours=ours, baseline=exact, slack=0.1, baseline_name="over all 2^14 codes", better="lower",
                  note=f"{many}; the sum over groups is never below")  # fmt: skip
        whole = _hard(bits, [14])
        yield Row(claim=f"entropy of the codes themselves by groups of at most {most} within 1 bit of their joint entropy", metric="bits",
                  ours=_hard(bits, bit_groups(14, most)), baseline=whole, slack=1.0, baseline_name="joint entropy", better="lower",
                  note=many)  # fmt: skip
    fitted = method.with_layer(layer, [network.encode(image[None]) for image in pictures()[0]])
    size = sum(8 * fitted.quantize(z).nbytes for z in latents)
    count = sum(z[..., 0].numel() for z in latents)
    yield Row(claim="files by the learned prior have fewer bits than the codes", metric="bits a vector, whole files", ours=size / count,
              baseline=14, baseline_name="14 bits, without headers", better="lower", note=many)  # fmt: skip
    yield Row(claim="files by the learned prior have fewer bits than the joint entropy of the codes", metric="bits a vector, whole files",
              ours=size / count, baseline=_hard(bits, [14]), baseline_name="joint entropy of the photographs' codes, table not counted",
              better="lower", note=many)  # fmt: skip
