"""What the paper claims, in one autoencoder trained alike for all quantizers; the teachers are fixed features of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import tersor
from tersor.evidence import Row, claim
from tersor_kit_vq.contest import PHOTOGRAPHS, SEEDS, Protocol, compared, judge, pictures, plain, seeds_row, trained, trials

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


def surroundings(images: Tensor) -> Tensor:
    """Grey levels of 6 x 6 cells of 2 x 2 pixels about each patch of 4 x 4, their mean taken off, at a length below 1 that grows with contrast: float
    N x H/4 x W/4 x 36. Images: float N x 3 x H x W."""
    cells = functional.avg_pool2d(images.mean(1, keepdim=True), 2)
    around = functional.unfold(functional.pad(cells, (2, 2, 2, 2), mode="replicate"), 6, stride=2).transpose(1, 2)
    around = around - around.mean(2, keepdim=True)
    around = around / (around.square().sum(2, keepdim=True) + 0.25**2).sqrt()
    return around.view(len(images), images.shape[2] // _CELL, images.shape[3] // _CELL, -1)


TEACHERS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "surroundings": (surroundings, 36),
    "orientations": (orientations, 9 * _BINS),
}


def _explained(codes: Tensor, features: Tensor, known_codes: Tensor, known: Tensor, size: int) -> float:
    """Share of the features' variance that the best guess by code explains, the mean of the training features that had this code."""
    counts = torch.bincount(known_codes, minlength=size).clamp(min=1)
    means = torch.zeros(size, known.shape[1]).index_add_(0, known_codes, known) / counts[:, None]
    return 1 - float((features - means[codes]).square().sum() / (features - known.mean(0)).square().sum())


@torch.no_grad()
def _measured(teacher: str, kind: str, seed: int) -> dict[str, float]:
    """Redundancy, error and what the first factor's code explains, of one training of 500 steps, on the held-out photographs."""
    features, size = TEACHERS[teacher]

    def alignment(layer: Any, x: Tensor, z: Tensor) -> Tensor:
        return layer.align(z, features(x))  # type: ignore[no-any-return]

    weight = 0.0 if kind == "plain" else 0.1
    method = tersor.quantizer("fqgan", codes=(64, 64), dim=32, disentangle=weight, features=(size,), seed=seed)
    network, layer = trained(method, seed, Protocol(steps=500), alignment if kind == "aligned" else None)
    sides = []
    for images in (pictures()[0], pictures()[1][PHOTOGRAPHS]):
        codes = [layer(network.encode(i[None])).codes.reshape(-1, 2) for i in images]
        sides.append((torch.cat(codes), torch.cat([features(i[None]).reshape(-1, size) for i in images])))
    (known_codes, known), (new_codes, new) = sides
    return {
        "redundancy": float(layer.redundancy(new_codes)), "mse": judge(network, layer, pictures()[1][PHOTOGRAPHS])[0]["mse"],
        "explained": _explained(new_codes[:, 0], new, known_codes[:, 0], known, 64),
    }  # fmt: skip


def _row(
    title: str,
    metric: str,
    key: str,
    sides: Sequence[list[dict[str, float]]],
    name: str,
    better: str,
    margin: float = 0.0,
    share: float = 0.0,
) -> Row:
    """Ours and theirs, three seeds each. ``share``: of theirs, by which ours may be worse."""
    ours, theirs = ([r[key] for r in side] for side in sides)
    slack = share * float(np.mean(theirs))
    return seeds_row(title, f"{metric}, photographs", ours, theirs, better, name, margin, slack)


@claim("the regulariser lowers the redundancy between factors; with alignment a factor tells more of the teacher's features")
def factors(seed: int) -> Iterator[Row]:
    """Two factors of 64 codewords, 500 steps, three seeds. Two teachers: the surroundings of a patch, and orientations of gradients, which are
    harder to learn in that time."""
    kinds = ("plain", "regularised", "aligned")
    for teacher in TEACHERS:
        found = {k: [_measured(teacher, k, s) for s in range(seed, seed + len(SEEDS))] for k in kinds}
        if teacher == "surroundings":
            yield _row("the regulariser lowers the squared cosine between factors", "mean squared cosine of codewords", "redundancy",
                       (found["regularised"], found["plain"]), "disentangle=0", "lower", margin=0.1)  # fmt: skip
        both = found["aligned"], found["regularised"]
        yield _row(f"an aligned factor's code tells more of the teacher's features, {teacher}", "share of their variance explained", "explained",
                   both, "without align", "higher", margin=0.1)  # fmt: skip
        yield _row(f"alignment costs at most a tenth more reconstruction error, {teacher}", "mean squared error", "mse", both, "without align",
                   "lower", share=0.1)  # fmt: skip
