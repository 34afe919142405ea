"""What the paper claims, in one autoencoder trained alike for all quantizers, and of generators of the codes of that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tersor
from tersor.evidence import Row, claim
from tersor_kit_vq.contest import PHOTOGRAPHS, SEEDS, Protocol, bits_in_use, pictures, trained

_SIDE = 8  # tokens


@claim(
    "bit tokens are all in use, their joint entropy is near their length, and images come back as from a codebook of as many bits"
)
def codebook_use(seed: int) -> Iterator[Row]:
    """At 10 and 13 bits a vector, beside a codebook of moving averages with as many."""
    for bits in (10, 13):
        yield from bits_in_use(f"maskbit:bits={bits},dim=32", bits, seed)


def _blocks(network: Any, layer: Any, images: list[Tensor]) -> Tensor:
    """Codes of all images in blocks of 8 x 8 tokens, int64 N x 8 x 8."""
    out = []
    for image in images:
        codes = layer(network.encode(image[None])).codes[0]
        height, width = (n // _SIDE for n in codes.shape)
        cut = codes[: height * _SIDE, : width * _SIDE].view(height, _SIDE, width, _SIDE)
        out.append(cut.transpose(1, 2).reshape(-1, _SIDE, _SIDE))
    return torch.cat(out)


@claim("the generator predicts masked groups of bits of new images, and bits as its input do as well as learned embeddings")
def generation(seed: int) -> Iterator[Row]:
    """10 bits in two groups, blocks of 8 x 8 tokens of the autoencoder's codes; generators of 2 blocks of width 128, 300 steps; three seeds, of
    the autoencoder too."""
    settings = dict(bits=10, dim=32, depth=2, steps=300)
    found: dict[str, list[float]] = {"order 0": [], "bits": [], "embeddings": []}
    for s in range(seed, seed + len(SEEDS)):
        with torch.no_grad():
            network, layer = trained(tersor.quantizer("maskbit", **settings), s, Protocol())
            training, judged = (_blocks(network, layer, images) for images in (pictures()[0], pictures()[1][PHOTOGRAPHS]))
        groups = torch.stack([judged.flatten() >> 5, judged.flatten() & 31], 1)
        counts = torch.stack([torch.bincount(groups[:, i], minlength=32) for i in (0, 1)]).double()
        found["order 0"].append(float(torch.special.entr(counts / counts.sum(1, keepdim=True)).sum(1).mean()) / np.log(2))
        for name in ("bits", "embeddings"):
            fitted = tersor.quantizer("maskbit", **settings, embedding=name == "embeddings", seed=s).with_layer(layer)
            found[name].append(fitted.fit_generator(training).cross_entropy(judged, seed=0, rounds=2))
    mean = {name: float(np.mean(values)) for name, values in found.items()}
    note = f"{len(SEEDS)} seeds; {'; '.join(f'{k}: ' + ', '.join(f'{v:.4f}' for v in values) for k, values in found.items())}"
    metric, rival = "bits a group of 5", "the same transformer with learned embeddings, equal steps"
    yield Row(claim="cross entropy of masked groups below their own order-0 entropy", metric=metric, ours=mean["bits"],
              baseline=mean["order 0"], baseline_name="entropy of the groups of these photographs", better="lower", note=note)  # fmt: skip
    yield Row(claim="bits as input: not above learned embeddings by more than 0.01 bits", metric=metric, ours=mean["bits"],
              baseline=mean["embeddings"], slack=0.01, baseline_name=rival, better="lower", note=note)  # fmt: skip
    yield Row(claim="bits as input: below learned embeddings", metric=metric, ours=mean["bits"], baseline=mean["embeddings"],
              baseline_name=rival, better="lower", note=note)  # fmt: skip
