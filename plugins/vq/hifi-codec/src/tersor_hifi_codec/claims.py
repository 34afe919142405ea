"""What the paper claims: in one autoencoder trained alike for all quantizers, three seeds, and on vectors of speech and of photographs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import tersor
from tersor.evidence import Row, claim, data
from tersor.io import load_audio
from tersor_kit_vq.contest import Protocol, compared, plain, seeds_row, trials

_OWN = Protocol(prior_steps=0)
_CODES, _DIM, _SEEDS = 256, 64, 3


@claim("4 codebooks in groups of residuals: below residual quantization and one codebook at equal bits")
def reconstruction(seed: int) -> Iterator[Row]:
    """At 2^12 values a vector: 2 groups of depth 2 with 8 codewords each, beside rq-vae of depth 4 and vq-vae."""
    ours = trials("hifi-codec:codes=8,dim=32", _OWN, seed)
    residual, one = trials("rq-vae:codes=8,dim=32,depth=4", _OWN, seed), trials(plain(12), _OWN, seed)
    yield from compared("less reconstruction error than rq-vae at 12 bits", "mse", ours, residual, "lower")
    yield from compared("less reconstruction error than vq-vae at 12 bits", "mse", ours, one, "lower")
    yield from compared("more of the codewords used than of vq-vae's at 12 bits", "use", ours, one, "higher", margin=0.1)


def speech() -> tuple[Tensor, Tensor] | None:
    """Log-mel frames of spoken digits where they are at hand, float32 N x 64, of four recordings in five and of the fifth: 32 ms, every 16 ms,
    64 triangular bands from 60 Hz to 4 kHz, the mean taken off."""
    path, index = data.shared("spoken-digits/fsdd_dev.flac"), data.shared("spoken-digits/fsdd_dev_index.npz")
    if path is None or index is None:
        return None
    audio = load_audio(path)
    with np.load(index) as table:
        offsets = table["offsets"]
    edges = 700 * (10 ** (torch.linspace(*(2595 * np.log10(1 + f / 700) for f in (60, audio.rate / 2)), _DIM + 2) / 2595) - 1)
    hertz, low, middle, high = torch.linspace(0, audio.rate / 2, 257), edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bands = torch.minimum((hertz - low) / (middle - low), (high - hertz) / (high - middle)).clamp(min=0)
    sets: tuple[list[Tensor], list[Tensor]] = ([], [])
    for k, (start, stop) in enumerate(itertools.pairwise(offsets)):
        x = torch.from_numpy(np.ascontiguousarray(audio.samples[0, start:stop]))
        power = torch.stft(x, 512, 128, 256, torch.hann_window(256), return_complex=True).abs().square()
        sets[k % 5 == 4].append((bands @ power + 1e-6).log().T)
    known, new = torch.cat(sets[0]), torch.cat(sets[1])
    return known - known.mean(0), new - known.mean(0)


def patches() -> tuple[Tensor, Tensor]:
    """Grey patches of 8 x 8 pixels, float32 N x 64: 20,000 of pictures to learn from, 5,000 of four photographs."""

    def of(images: dict[str, np.ndarray], count: int) -> Tensor:
        found = [functional.unfold(torch.from_numpy(i).mean(0)[None, None], 8, stride=8)[0].T for i in images.values()]
        every = torch.cat(found)
        return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:count]]

    known, new = of(data.pictures(), 20000), of(data.photographs(), 5000)
    return known - known.mean(0), new - known.mean(0)


def _error(known: Tensor, new: Tensor, seed: int, name: str = "hifi-codec", **settings: int) -> list[float]:
    """|x - q|^2 / |x|^2 of vectors that were not learned from, one for each seed."""
    out = []
    for s in range(seed, seed + _SEEDS):
        layer = tersor.quantizer(name, codes=_CODES, dim=_DIM, steps=300, seed=s, **settings).fit([known]).layer(fitted=True)
        with torch.no_grad():
            out.append(float((new - layer(new).values).square().sum() / new.square().sum()))
    return out


@claim("every depth takes error away; 2 x 2 codebooks beside 4 in a row")
def vectors(seed: int) -> Iterator[Row]:
    """Frames of speech and patches of photographs, 256 codewords in each codebook, moving averages alone."""
    sets = {"frames of speech": speech(), "patches of photographs": patches()}
    for name, found in sets.items():
        if found is None:
            continue
        by_depth = {d: _error(*found, seed, depth=d) for d in (1, 2, 3, 4)}
        rivals = {"a codebook for each depth (groups=1)": _error(*found, seed, depth=4, groups=1),
                  "rq-vae:depth=4": _error(*found, seed, "rq-vae", depth=4)}  # fmt: skip
        sides = [(f"less error at depth {d} than at {d - 1}", by_depth[d], by_depth[d - 1], f"depth {d - 1}") for d in (2, 3, 4)]
        sides += [("2 groups of depth 2 below depth 4 of whole vectors, 32 bits", by_depth[2], theirs, text)
                  for text, theirs in rivals.items()]  # fmt: skip
        for title, ours, theirs, text in sides:
            yield seeds_row(f"{title}, {name}", "relative squared error of new vectors", ours, theirs, "lower", text)
