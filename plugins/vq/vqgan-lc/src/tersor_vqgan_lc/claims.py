"""What the paper claims, in one autoencoder trained alike for all quantizers, three seeds."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tersor.api import as_method
from tersor.evidence import Row, claim
from tersor_kit_vq import FACTOR, kmeans
from tersor_kit_vq.contest import (
    MOST,
    SEEDS,
    Protocol,
    codes_in_use,
    compared,
    judge,
    pictures,
    plain,
    sets,
    trained,
    trained_longer,
    trials,
)

PATCH = 3 * FACTOR**2


@functools.cache
def pixels() -> Tensor:
    """Patches of 4 x 4 pixels of the pictures to train on, standardised: 131,072 x 48, drawn at random. They stand for the features of a
    pretrained network, which the paper takes and no package here has."""
    patches = torch.cat([functional.pixel_unshuffle(i, FACTOR).flatten(1).T for i in pictures()[0]])
    chosen = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))[: 1 << 17]
    return (patches[chosen] - patches.mean()) / patches.std()


class _OfPixels:
    """The method with the layer that starts from given features."""

    def __init__(self, codes: int, features: Tensor) -> None:
        self.method = as_method(f"vqgan-lc:codes={codes},dim={Protocol().dim},feature_dim={PATCH}")
        self.features, self.dim = features, self.method.dim

    def layer(self) -> Any:
        return self.method.layer(start=self.features)

    def __str__(self) -> str:
        return f"{self.method} of pixels"


def _judged(method: _OfPixels, seed: int, protocol: Protocol) -> dict[str, Any]:
    network, layer = trained(method, seed, protocol)
    return {"method": str(method), **{of: judge(network, layer, images)[0] for of, images in sets().items()}}


def _seeds(codes: int, features: Tensor, seed: int, protocol: Protocol) -> list[dict[str, Any]]:
    return [_judged(_OfPixels(codes, features), s, protocol) for s in range(seed, seed + len(SEEDS))]


@claim("frozen features with a learned projector use a large codebook, and reconstruct better than a plain one")
def large_codebook(seed: int) -> Iterator[Row]:
    """8,192 codes: centres of pixels, and, without any features given, of the first batch's vectors."""
    theirs = trials(plain(13), seed=seed)
    ours = trials("vqgan-lc:codes=8192,dim=32", seed=seed)
    of_pixels = _seeds(8192, kmeans(pixels(), 8192, 5)[0], seed, Protocol())
    for rows, what in ((of_pixels, "features of pixels"), (ours, "features of the first batch")):
        yield from codes_in_use(8192, rows, theirs, MOST, f", {what}")


@claim("a larger codebook yet reconstructs better, where a plain one gains little")
def larger(seed: int) -> Iterator[Row]:
    """32,768 patches of pixels as they are, against 8,192 centres of them; 200 steps each. The photographs have some 57,000 vectors."""
    protocol = Protocol(steps=200, prior_steps=0)
    theirs = trials(plain(15), protocol, seed)
    large = _seeds(1 << 15, pixels()[: 1 << 15], seed, protocol)
    small = _seeds(8192, kmeans(pixels(), 8192, 5)[0], seed, protocol)
    yield from compared("less reconstruction error with 32768 codes than with 8192", "mse", large, small, "lower")
    yield from compared("more of 32768 codes used than of vq-vae's", "use", large, theirs, "higher", margin=0.1)
    yield from compared("less reconstruction error than vq-vae, 32768 codes", "mse", large, theirs, "lower")


@claim("trained longer, more of a large codebook is used")
def longer(seed: int) -> Iterator[Row]:
    """8,192 codes, 4,000 steps in place of 1,000, one seed."""
    return trained_longer("vqgan-lc:codes=8192,dim=32", 13, 4000, Protocol(), seed)
