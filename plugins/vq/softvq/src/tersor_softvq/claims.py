"""What the paper claims, in one autoencoder trained alike for all quantizers, three seeds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tersor.api import as_method
from tersor.evidence import Row, claim
from tersor_kit_vq import Quantized
from tersor_kit_vq.contest import SEEDS, Protocol, compared, judge, plain, sets, trained, trials


class _Continuous:
    """A trained layer that leaves nothing out of its averages, as the paper's."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.sizes = layer, layer.sizes

    def __call__(self, z: Tensor) -> Quantized:
        out = self.layer(z)
        return Quantized(self.layer.soft(z), out.codes, out.loss)


def _judged(method: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One training: judged with its continuous values, and with what is stored."""
    network, layer = trained(as_method(method), seed, Protocol())
    rows = []
    for name, quantizer in ((f"{method}, continuous", _Continuous(layer)), (method, layer)):
        rows.append({"method": name, **{of: judge(network, quantizer, images)[0] for of, images in sets().items()}})
    return rows[0], rows[1]


@claim("continuous tokens from a softmax over the codebook reconstruct better than hard ones, and the codebook is used")
def continuous(seed: int) -> Iterator[Row]:
    """1,024 codewords each. The continuous values are not at equal bits: they are those that the paper's models generate."""
    theirs = trials(plain(10), seed=seed)
    both = [_judged("softvq:codes=1024,dim=32,kept=1", s) for s in range(seed, seed + len(SEEDS))]
    whole, stored = [b[0] for b in both], [b[1] for b in both]
    yield from compared("less reconstruction error than vq-vae, continuous values", "mse", whole, theirs, "lower")
    yield from compared("more codewords likeliest for some vector than vq-vae uses", "use", whole, theirs, "higher", margin=0.1)
    yield from compared(
        "less reconstruction error than vq-vae, the likeliest codeword alone, 10 bits", "mse", stored, theirs, "lower"
    )


@claim("two codewords with a weight store more than one codeword of as many bits")
def stored_pairs(seed: int) -> Iterator[Row]:
    """At 10 bits a vector: 2 of 16 codewords and a weight of 2 bits."""
    ours, theirs = trials("softvq:codes=16,dim=32,kept=2,weight_bits=2", seed=seed), trials(plain(10), seed=seed)
    alone = [_judged("softvq:codes=16,dim=32,kept=1", s)[1] for s in range(seed, seed + len(SEEDS))]
    yield from compared("less reconstruction error than with the likeliest of the 16 alone", "mse", ours, alone, "lower")
    yield from compared("less reconstruction error than vq-vae, 10 bits a vector", "mse", ours, theirs, "lower")
    yield from compared("nearly all codewords used", "use", ours, 0.95, "higher", name="19 of 20")
