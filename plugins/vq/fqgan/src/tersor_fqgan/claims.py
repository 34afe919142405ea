"""What the paper claims, in one autoencoder trained alike for all quantizers; the teacher is orientations of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import tersor
from tersor.evidence import Row, claim
from tersor_kit_vq.contest import PHOTOGRAPHS, SEEDS, Protocol, compared, pictures, plain, trained, trials

_BINS, _CELL = 8, 4  # orientations, pixels of a cell's side


@claim("sub-codebooks are used whole, and images come back as from one codebook of as many bits")
def codebook_use(seed: int) -> Iterator[Row]:
    """Two factors, at 10 and 13 bits a vector, beside a codebook of moving averages with as many."""
    for bits, codes in ((10, "[32,32]"), (13, "[128,64]")):
        ours, theirs = trials(f"fqgan:codes={codes},dim=32", seed=seed), trials(plain(bits), seed=seed)
        yield from compared(
            f"sub-codebooks of {codes} codewords: nearly all used", "use", ours, 0.95, "higher", name="19 of 20 of each"
        )
        yield from compared(f"share used of sub-codebooks above vq-vae's, {bits} bits", "use", ours, theirs, "higher", margin=0.1)
        yield from compared(f"more different codes of a vector than vq-vae's, {bits} bits", "perplexity", ours, theirs, "higher")
        yield from compared(f"less reconstruction error than vq-vae, {bits} bits", "mse", ours, theirs, "lower")


def orientations(images: Tensor) -> Tensor:
    """Histograms of the gradient's orientation, weighted by its magnitude, in 3 x 3 cells of 4 x 4 pixels about each patch of 4 x 4: float N x H/4 x W/4 x 72,
    each of length 1 (0 where there is no gradient). Images: float N x 3 x H x W."""
    grey = functional.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    x, y = (grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2])[:, 0], (grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1])[:, 0]
    place = torch.atan2(y, x) % math.pi * (_BINS / math.pi)
    low = place.floor().long() % _BINS
    weight, part = (x.square() + y.square()).sqrt(), place - place.floor()
    bins = torch.zeros(len(images), _BINS, *x.shape[1:])
    bins.scatter_add_(1, low[:, None], (weight * (1 - part))[:, None])
    bins.scatter_add_(1, ((low + 1) % _BINS)[:, None], (weight * part)[:, None])
    cells = functional.avg_pool2d(bins, _CELL)
    around = functional.unfold(functional.pad(cells, (1, 1, 1, 1), mode="replicate"), 3)
    return functional.normalize(around.transpose(1, 2), dim=2, eps=1e-3).view(len(images), *cells.shape[2:], -1)


def _explained(codes: Tensor, features: Tensor, known_codes: Tensor, known: Tensor, size: int) -> float:
    """Share of the features' variance that the best guess by code explains, the mean of the training features that had this code."""
    counts = torch.bincount(known_codes, minlength=size).clamp(min=1)
    means = torch.zeros(size, known.shape[1]).index_add_(0, known_codes, known) / counts[:, None]
    return 1 - float((features - means[codes]).square().sum() / (features - known.mean(0)).square().sum())


@claim("the regulariser lowers the redundancy between factors; with alignment a factor tells more of the teacher's features")
@torch.no_grad()
def factors(seed: int) -> Iterator[Row]:
    """Two factors of 64 codewords, 500 steps, three seeds; judged on the held-out photographs."""
    protocol = Protocol(steps=500)
    kinds = {"both": (0.1, True), "regularised": (0.1, False), "plain": (0.0, False)}
    rows: dict[str, list[dict[str, float]]] = {k: [] for k in kinds}

    def alignment(layer: Any, x: Tensor, z: Tensor) -> Tensor:
        return layer.align(z, orientations(x))  # type: ignore[no-any-return]

    for kind, (weight, align) in kinds.items():
        for s in range(seed, seed + len(SEEDS)):
            method = tersor.quantizer("fqgan", codes=(64, 64), dim=32, disentangle=weight, features=(9 * _BINS,), seed=s)
            network, layer = trained(method, s, protocol, alignment if align else None)
            sides = []
            for images in (pictures()[0], pictures()[1][PHOTOGRAPHS]):
                codes = [layer(network.encode(i[None])).codes.reshape(-1, 2) for i in images]
                sides.append((torch.cat(codes), torch.cat([orientations(i[None]).reshape(-1, 9 * _BINS) for i in images])))
            (known_codes, known), (codes, features) = sides
            errors = [
                (network.decode(layer(network.encode(i[None])).values).clamp(0, 1)[0] - i).square().mean()
                for i in pictures()[1][PHOTOGRAPHS]
            ]
            rows[kind].append({
                "redundancy": float(layer.redundancy(codes)), "mse": float(torch.stack(errors).mean()),
                "explained": _explained(codes[:, 0], features, known_codes[:, 0], known, 64),
            })  # fmt: skip

    def row(title: str, metric: str, key: str, ours: str, theirs: str, better: str, name: str, **more: float) -> Row:
        note = "; ".join(f"{k}: {', '.join(f'{r[key]:.4g}' for r in rows[k])}" for k in (ours, theirs))
        mean = {k: float(np.mean([r[key] for r in rows[k]])) for k in (ours, theirs)}
        return Row(claim=title, metric=metric, ours=mean[ours], baseline=mean[theirs], baseline_name=name, better=better,
                   note=f"{len(SEEDS)} seeds; {note}", **more)  # fmt: skip

    yield row("the regulariser lowers the squared cosine between factors", "mean squared cosine of codewords, photographs", "redundancy",
              "regularised", "plain", "lower", "disentangle=0", margin=0.1)  # fmt: skip
    yield row("an aligned factor's code tells more of the teacher's features", "share of their variance explained, photographs", "explained",
              "both", "regularised", "higher", "without align", margin=0.1)  # fmt: skip
    yield row("alignment costs at most a tenth more reconstruction error", "mean squared error, photographs", "mse",
              "both", "regularised", "lower", "without align", slack=0.1 * float(np.mean([r["mse"] for r in rows["regularised"]])))  # fmt: skip
