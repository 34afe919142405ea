"""What the paper claims, in one autoencoder trained alike for all quantizers, three seeds; and its prior on the codes of held-out pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

import tersor
from tersor.evidence import Row, claim
from tersor_kit_vq import join
from tersor_kit_vq.contest import PHOTOGRAPHS, Protocol, compared, mean, pictures, plain, trained, trials
from tersor_rq_vae.rq_transformer import RQTransformer

_SIDE = 8  # positions of a grid that the prior sees
_OWN = Protocol(prior_steps=0)


def _method(codes: int, depth: int) -> str:
    return str(tersor.quantizer("rq-vae", codes=codes, dim=_OWN.dim, depth=depth))


@claim("every depth brings the values nearer, and more codes of a small codebook beat one of a large codebook at equal bits")
def depths(seed: int) -> Iterator[Row]:
    """32 codewords (5 bits) at depths 1 to 4; depth 2 beside one codebook of 2^10, depth 4 of 16 codewords beside 2^16 being too many."""
    by_depth = {d: trials(_method(32, d), _OWN, seed) for d in (1, 2, 3, 4)}
    for d in (2, 3, 4):
        note = "mean over 3 seeds"
        yield Row(claim=f"less reconstruction error at depth {d} than at {d - 1}, 32 codewords", metric="mean squared error",
                  ours=mean(by_depth[d], "mse"), baseline=mean(by_depth[d - 1], "mse"), baseline_name=f"depth {d - 1}", better="lower", note=note)  # fmt: skip
    ten = trials(plain(10), seed=seed)
    yield from compared("less reconstruction error than vq-vae at 10 bits", "mse", by_depth[2], ten, "lower")
    yield from compared("more of the codewords used than of vq-vae's at 10 bits", "use", by_depth[2], ten, "higher", margin=0.1)


@claim("the RQ-Transformer predicts the codes of new pictures")
def prior(seed: int) -> Iterator[Row]:
    """Grids of 8 x 8 positions and depth 2, trained on pictures, judged on photographs; bits a vector."""
    network, layer = trained(tersor.quantizer("rq-vae", codes=32, dim=_OWN.dim, depth=2), seed, _OWN)

    def grids(images: list[Tensor]) -> Tensor:
        found = []
        with torch.no_grad():
            for image in images:
                z = network.encode(image[None])[0]
                height, width = (n // _SIDE * _SIDE for n in z.shape[:2])
                found.append(z[:height, :width].unflatten(0, (-1, _SIDE)).unflatten(2, (-1, _SIDE)).transpose(1, 2).flatten(0, 1))
        return torch.cat(found)

    images, judged = pictures()
    known, new = grids(images), grids(judged[PHOTOGRAPHS])
    new = new[torch.randperm(len(new), generator=torch.Generator().manual_seed(seed))[:256]]
    codes, known_codes = layer(new).codes, join(layer(known).codes, layer.sizes)
    joint = join(codes, layer.sizes)
    seen = torch.bincount(known_codes.reshape(-1), minlength=1024).double() + 0.5
    order0 = float(-(seen / seen.sum()).log2()[joint].mean())
    hard = RQTransformer(layer, _SIDE, _SIDE, 64, 4, 2, 1).fit([known], 500, seed=seed)
    bits = hard.bits(codes)
    yield Row(claim="fewer bits than by the frequencies of training", metric="bits a vector", ours=bits, baseline=order0,
              baseline_name="order 0, frequencies of the training pictures", better="lower", note=f"10 bits as stored; {len(new)} grids, 500 steps")  # fmt: skip
    unit = float((new - layer(new).values).square().sum(-1).mean())
    soft = RQTransformer(layer, _SIDE, _SIDE, 64, 4, 2, 1).fit([known], 500, temperature=unit / 4, seed=seed).bits(codes)
    yield Row(claim="stochastic codes and soft labels: fewer bits for the hard codes", metric="bits a vector", ours=soft, baseline=bits,
              baseline_name="hard codes in training", better="lower", note=f"temperature a quarter of the mean squared error {unit:.3g} of a vector")  # fmt: skip
    drawn = hard.sample(64, seed)
    frequencies = torch.bincount(join(drawn, layer.sizes).reshape(-1), minlength=1024).double()
    entropy = float(
        -(frequencies[frequencies > 0] / frequencies.sum() * (frequencies[frequencies > 0] / frequencies.sum()).log2()).sum()
    )
    yield Row(claim="samples are as varied as pictures, within a bit", metric="entropy of the codes of samples, bits", ours=entropy,
              baseline=float(-(seen / seen.sum() * (seen / seen.sum()).log2()).sum()), slack=1.0, baseline_name="training pictures", better="higher",
              note=f"64 grids of {_SIDE} x {_SIDE}; at most {math.log2(64 * _SIDE**2):.0f} bits")  # fmt: skip
