"""One training for all vector quantizers: the same autoencoder, pictures, steps and seeds, so that only the quantizer differs.

Trained on the pictures that scikit-image and scikit-learn ship, in random crops; judged on the four photographs that those leave out
(:func:`tersor.data.photographs`), and on the Kodak photographs where they are at hand. Results are kept in the cache folder, by
method, protocol, seed and code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor import InputError
from tersor.api import as_method
from tersor.evidence import Row, data
from tersor.files import atomic_write
from tersor.model.board import clock, sources_digest
from tersor.progress import track
from tersor.registry import cache_folder
from tersor_kit_vq.autoencoder import FACTOR, Residual, crops
from tersor_kit_vq.codebook import Quantized
from tersor_kit_vq.packing import join
from tersor_kit_vq.prior import IndexPrior

SEEDS = (0, 1, 2)
PHOTOGRAPHS, KODAK, TAUGHT = "photographs", "Kodak", "training pictures"
_PRIOR_LIMIT = 1 << 11  # different codes of a vector that one prior takes


@attrs.frozen(kw_only=True)
class Protocol:
    """What every quantizer gets: an autoencoder with vectors of ``dim`` dimensions for 4 x 4 pixels and ``width`` channels; ``steps`` steps
    of Adam on ``batch`` crops of ``size`` x ``size``, rate ``rate`` falling to nothing by half a cosine; then a learned prior of the codes in
    ``prior_steps`` steps (0: none)."""

    dim: int = 32
    width: int = 32
    steps: int = 1000
    batch: int = 16
    size: int = 32
    rate: float = 2e-3
    prior_steps: int = 400


class PatchAutoencoder(nn.Module):
    """Patches of 4 x 4 pixels as vectors, and back: each way a linear map of the patch and, added to it, a small residual network that sees
    the neighbours. It learns in hundreds of steps what strided convolutions need thousands for.

    Images: float N x 3 x H x W in [0, 1], H and W multiples of 4; latents: N x H/4 x W/4 x dim.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        pixels = 3 * FACTOR**2

        def network(here: int, there: int) -> nn.Module:
            body = nn.Sequential(nn.Conv2d(here, width, 3, padding=1), Residual(width, width), Residual(width, width), nn.ReLU())
            return nn.Sequential(body, nn.Conv2d(width, there, 1))

        self.patch, self.encoder = nn.Conv2d(pixels, dim, 1), network(pixels, dim)
        self.unpatch, self.decoder = nn.Conv2d(dim, pixels, 1), network(dim, pixels)

    def encode(self, images: Tensor) -> Tensor:
        """Latents, N x H/4 x W/4 x dim."""
        x = functional.pixel_unshuffle((images - 0.5) * 4, FACTOR)
        return (self.patch(x) + self.encoder(x)).movedim(1, -1)  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        """Images, N x 3 x H x W, not cut to [0, 1]."""
        z = latents.movedim(-1, 1)
        return functional.pixel_shuffle(self.unpatch(z) + self.decoder(z), FACTOR) / 4 + 0.5


@functools.cache
def pictures() -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Pictures to train on, and sets of pictures that judge by name: float32 3 x H x W in [0, 1], H and W multiples of 4."""
    from tersor.io import load_image

    def whole(image: np.ndarray) -> Tensor:
        height, width = (n // FACTOR * FACTOR for n in image.shape[1:])
        return torch.from_numpy(np.ascontiguousarray(image[:, :height, :width]))

    judged = {PHOTOGRAPHS: [whole(x) for x in data.photographs().values()]}
    kodak = [data.shared(f"kodak/kodim{i:02d}.png") for i in range(1, 25, 4)]
    if any(kodak):
        judged[KODAK] = [whole(load_image(p)) for p in kodak if p is not None]
    return [whole(x) for x in data.pictures().values()], judged


def sets() -> dict[str, list[Tensor]]:
    """All pictures by name: the sets that judge, and those of training."""
    taught, judged = pictures()
    return {**judged, TAUGHT: taught}


class _Same(nn.Module):
    sizes, bits = 1, None

    def forward(self, z: Tensor) -> Quantized:
        return Quantized(z, torch.zeros(z.shape[:-1], dtype=torch.int64), z.new_zeros(()))


class Unquantized:
    """In place of a method, vectors as they are: what the autoencoder reaches and takes by itself."""

    name = "none"

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def __str__(self) -> str:
        return "no quantizer"

    def layer(self) -> nn.Module:
        return _Same()


def layer_of(method: Any, dim: int) -> nn.Module:
    """The layer of a method for vectors of ``dim`` dimensions: its own, or one with linear maps from and to its dimensions."""
    return method.layer() if getattr(method, "dim", dim) == dim and hasattr(method, "dim") else method.layer(dim)  # type: ignore[no-any-return]


def trial(method: Any, seed: int = 0, protocol: Protocol | None = None) -> dict[str, Any]:
    """Train one method with one seed, and judge it: a row, from the cache where it was measured before.

    ``bits``: log2 of the number of codes of a vector. By set of pictures, those of training too: ``mse``, ``psnr`` (dB, of the mean error); ``use``, the share of
    live codes (mean over the indices of a vector); ``perplexity`` of the codes (of all indices of a vector together); ``order0``, their entropy in
    bits a vector; ``error``, |z - q|^2 / |z - mean|^2 of the vectors; ``spread``, the variance of a vector's element; on the photographs ``prior_bits``, bits a
    vector by a prior learned on the training pictures. ``seconds``: of training; ``encode`` and ``decode``: vectors a second, all of the processor
    where torch has one thread. Of :class:`Unquantized` only errors and seconds mean something.
    """
    method, protocol = method if isinstance(method, Unquantized) else as_method(method), protocol or Protocol()
    here = sys.modules[__name__]
    key = json.dumps([attrs.asdict(protocol), str(method), seed, sources_digest(method, (here,)), sorted(pictures()[1])])
    path = cache_folder() / "vq-contest" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError):
        return {**json.loads(path.read_text("utf-8")), "cached": True}
    row = _trial(method, seed, protocol)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(row).encode())
    return row


def trained(
    method: Any, seed: int, protocol: Protocol, beside: Callable[[Any, Tensor, Tensor], Tensor] | None = None
) -> tuple[PatchAutoencoder, Any]:
    """The autoencoder and the layer that a method's training under the protocol ends with, both in evaluation mode. ``beside``: of the layer,
    images and latents, a loss that is added to the others."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = PatchAutoencoder(protocol.dim, protocol.width)
        layer = layer_of(method, protocol.dim).train()
        chosen = [p for p in (*network.parameters(), *layer.parameters()) if p.requires_grad]
        optimizer = torch.optim.Adam(chosen, protocol.rate, betas=(0.9, 0.99))
        generator = torch.Generator().manual_seed(seed)
        images, _ = pictures()
        variance = float(torch.cat([i.reshape(-1) for i in images]).var())
        for step in track(range(protocol.steps), f"training {method}, seed {seed}"):
            for group in optimizer.param_groups:
                group["lr"] = protocol.rate * (0.5 + 0.5 * math.cos(math.pi * step / protocol.steps))
            x = crops(images, protocol.batch, protocol.size, generator)
            z = network.encode(x)
            out: Quantized = layer(z)
            loss = functional.mse_loss(network.decode(out.values), x) / variance + out.loss
            if beside is not None:
                loss = loss + beside(layer, x, z)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(chosen, 1.0)
            optimizer.step()
    return network.eval(), layer.eval()


@torch.no_grad()
def _trial(method: Any, seed: int, protocol: Protocol) -> dict[str, Any]:
    start = clock()
    network, layer = trained(method, seed, protocol)
    row: dict[str, Any] = {
        "method": str(method),
        "name": method.name,
        "seed": seed,
        "bits": layer.bits,
        "seconds": clock() - start,
    }
    grids: dict[str, list[Tensor]] = {}
    for name, images in sets().items():
        row[name], grids[name] = judge(network, layer, images)
    if isinstance(method, Unquantized):
        return row
    z = network.encode(functional.interpolate(pictures()[1][PHOTOGRAPHS][0][None], (512, 512)))
    codes = layer(z).codes
    for what, call in (("encode", lambda: layer(z)), ("decode", lambda: layer.codes_to_values(codes))):
        begin, count = clock(), 0
        while count < 3 or clock() - begin < 0.2:
            call()
            count += 1
        row[what] = count * (z.numel() // z.shape[-1]) / (clock() - begin)
    row["prior_bits"] = None
    if protocol.prior_steps and 2**layer.bits <= _PRIOR_LIMIT:
        steps = track(range(protocol.prior_steps), f"training the prior of {method}, seed {seed}")
        prior = IndexPrior.fit(grids[TAUGHT], round(2**layer.bits), steps, protocol.prior_steps, seed, width=64)
        bits, count = sum(prior.bits(g) for g in grids[PHOTOGRAPHS]), sum(g.numel() for g in grids[PHOTOGRAPHS])
        row["prior_bits"] = bits / count
    return row


def joined(codes: Tensor, layer: Any) -> Tensor:
    """Codes, int64 of the leading shape, with all indices of a vector as one number; above 62 bits a hash of them."""
    if isinstance(layer.sizes, int):
        return codes
    if layer.bits <= 62:
        return join(codes, layer.sizes)
    odd = torch.randint(1 << 62, (len(layer.sizes),), generator=torch.Generator().manual_seed(0)) | 1
    return (codes * odd).sum(-1)


@torch.no_grad()
def judge(network: PatchAutoencoder, layer: Any, images: Sequence[Tensor]) -> tuple[dict[str, float], list[Tensor]]:
    """Errors and use of codes over pictures, as :func:`trial` says, and the grids of joined codes."""
    sizes = (layer.sizes,) if isinstance(layer.sizes, int) else layer.sizes
    live = [torch.zeros(n, dtype=torch.bool) for n in sizes]
    squares, pixels, distance, count = 0.0, 0, 0.0, 0
    total, square, grids = torch.zeros(1), torch.zeros(1), []
    for image in images:
        z = network.encode(image[None])
        out = layer(z)
        squares += float((network.decode(out.values).clamp(0, 1)[0] - image).square().sum())
        pixels += image.numel()
        codes = out.codes.reshape(-1, len(sizes))
        for i, seen in enumerate(live):
            seen[codes[:, i]] = True
        distance += float((z - out.values).square().sum())
        total, square = total + z.sum((0, 1, 2)), square + z.square().sum((0, 1, 2))
        count += z.numel() // z.shape[-1]
        grids.append(joined(out.codes, layer))
    spread = float((square / count - (total / count).square()).sum())
    histogram = torch.unique(torch.cat([g.reshape(-1) for g in grids]), return_counts=True)[1].double() / count
    order0 = float(-(histogram * histogram.log2()).sum())
    mse = squares / pixels
    return {
        "mse": mse, "psnr": -10 * math.log10(mse), "use": float(np.mean([float(s.float().mean()) for s in live])),
        "perplexity": 2**order0, "order0": order0, "error": distance / count / max(spread, 1e-30), "spread": spread / z.shape[-1],
    }, grids  # fmt: skip


def trials(method: Any, protocol: Protocol | None = None, seed: int = 0, count: int = len(SEEDS)) -> list[dict[str, Any]]:
    """:func:`trial` with the seeds from ``seed`` on."""
    return [trial(method, s, protocol) for s in range(seed, seed + count)]


def mean(rows: Sequence[dict[str, Any]], key: str, pictures_of: str = PHOTOGRAPHS) -> float:
    """Mean over seeds of what :func:`trial` measured."""
    return float(np.mean([r[pictures_of][key] if key in r[pictures_of] else r[key] for r in rows]))


def seeds_row(
    title: str, metric: str, ours: Sequence[float], theirs: Sequence[float] | float, better: str, name: str, margin: float = 0.0,
    slack: float = 0.0, note: str = "",
) -> Row:  # fmt: skip
    """A row of a claim: means over the seeds, each seed in the note, which ``note`` ends. ``theirs``: of as many trainings, or one number."""
    told = f"{len(ours)} seeds: {', '.join(f'{v:.4g}' for v in ours)}"
    if not isinstance(theirs, (int, float)):
        told += f"; the other side: {', '.join(f'{v:.4g}' for v in theirs)}"
    return Row(claim=title, metric=metric, ours=float(np.mean(ours)), baseline=float(np.mean(theirs)), baseline_name=name, better=better,
               margin=margin, slack=slack, note=told + note)  # fmt: skip


def compared(
    title: str, key: str, ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]] | float, better: str,
    name: str = "", metric: str = "", margin: float = 0.0, slack: float = 0.0,
) -> Iterator[Row]:  # fmt: skip
    """Rows of a claim, one for each set of pictures that judges, and for the use of codes also of the training pictures, which are most: the means
    over the seeds, each seed in the note. ``theirs``: rows, or a number that ``name`` explains."""
    units = {"mse": "mean squared error", "psnr": "PSNR (dB)", "use": "share of live codes", "error": "relative squared error of the vectors",
             "perplexity": "perplexity of the codes", "order0": "bits a vector", "prior_bits": "bits a vector by the learned prior"}  # fmt: skip
    if not ours:
        raise InputError("compared takes rows of at least one seed; given: none")
    for of in (PHOTOGRAPHS, KODAK, TAUGHT):
        if of not in ours[0] or (key == "prior_bits" and of != PHOTOGRAPHS) or (key != "use" and of == TAUGHT):
            continue
        values, other = [mean([r], key, of) for r in ours], theirs
        if not isinstance(theirs, (int, float)):
            other, name = [mean([r], key, of) for r in theirs], name or str(theirs[0]["method"])
        yield seeds_row(f"{title}, {of}", metric or units[key], values, other, better, name, margin, slack)


#: How much of a codebook is to be in use, in words, as a share, and in words for the other side.
NEARLY_ALL, MOST = ("nearly all", 0.95, "19 of 20"), ("most", 0.8, "four of five")


def codes_in_use(
    codes: int,
    ours: Sequence[dict[str, Any]],
    theirs: Sequence[dict[str, Any]],
    enough: tuple[str, float, str] = NEARLY_ALL,
    what: str = "",
) -> Iterator[Row]:
    """Rows of a codebook beside :func:`plain`'s with as many ``codes``: more in use, enough of them, and less error. ``what`` ends the titles."""
    words, share, name = enough
    yield from compared(f"more of {codes} codes used than of vq-vae's{what}", "use", ours, theirs, "higher", margin=0.1)
    yield from compared(f"{words} of {codes} codes used{what}", "use", ours, share, "higher", name=name)
    yield from compared(f"less reconstruction error than vq-vae, {codes} codes{what}", "mse", ours, theirs, "lower")


def bits_in_use(method: str, bits: int, seed: int) -> Iterator[Row]:
    """Rows of codes that are bits beside :func:`plain`'s: more in use, their joint entropy near their length, and less error."""
    ours, theirs = trials(method, seed=seed), trials(plain(bits), seed=seed)
    yield from compared(f"more of 2^{bits} codes used than of vq-vae's", "use", ours, theirs, "higher", margin=0.1)
    yield from compared(
        f"joint entropy above 0.9 of {bits} bits", "order0", ours, 0.9 * bits, "higher", name=f"0.9 of {bits} bits"
    )
    yield from compared(f"less reconstruction error than vq-vae, {bits} bits", "mse", ours, theirs, "lower")


def trained_longer(
    method: str, bits: int, steps: int, before: Protocol, seed: int, enough: tuple[str, float, str] = NEARLY_ALL
) -> Iterator[Row]:
    """Rows of 2^``bits`` codes after ``steps`` steps: beside those after the protocol ``before``, and beside :func:`plain`'s; one seed."""
    codes, (words, share, name), protocol = 2**bits, enough, Protocol(steps=steps, prior_steps=0)
    ours, theirs, short = (trials(m, p, seed, 1) for m, p in ((method, protocol), (plain(bits), protocol), (method, before)))
    yield from compared(f"more of {codes} codes used after {steps:,} steps than after {before.steps:,}", "use", ours, short, "higher", margin=0.1,
                        name=f"{before.steps:,} steps")  # fmt: skip
    yield from compared(f"{words} of {codes} codes used after {steps:,} steps", "use", ours, share, "higher", name=name)
    yield from compared(
        f"more of {codes} codes used than of vq-vae's, {steps:,} steps each", "use", ours, theirs, "higher", margin=0.1
    )
    yield from compared(
        f"less reconstruction error than vq-vae, {codes} codes, {steps:,} steps each", "mse", ours, theirs, "lower"
    )


def plain(bits: int, dim: int = Protocol().dim) -> Any:
    """The vq-vae of ``bits`` bits a vector that methods are compared with."""
    return as_method(f"vq-vae:codes={2**bits},dim={dim},encoder=none,prior=none")


def contestants(names: Iterable[str] | None = None, bits: int = 10, dim: int = Protocol().dim) -> list[str]:
    """The strings of all installed quantizers with a layer at about ``bits`` bits a vector, by their ``at_code_bits``; ``names``: of
    these only. A method that cannot be imported is left out with a warning; one that is named raises the lookup errors."""
    import warnings

    from tersor import registry
    from tersor.errors import TersorError

    chosen = list(names or [])
    known = chosen or sorted(
        m["name"] for m in registry.listing() if m["kind"] == "quantizer" and "latent" in m["domain"].split(",")
    )
    out: dict[str, None] = {}
    for name in known:
        if ":" in name:
            out[str(as_method(name))] = None
            continue
        try:
            cls = registry.lookup("quantizer", name)
        except TersorError as error:
            if chosen:
                raise
            warnings.warn(f"{name} is left out: {error}", stacklevel=2)
            continue
        out.update((str(m), None) for m in getattr(cls, "at_code_bits", lambda *_: [])(bits, dim))
    return list(out)
