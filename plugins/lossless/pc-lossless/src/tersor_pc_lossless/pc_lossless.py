"""PC-lossless: a hidden Chow-Liu tree, learned with EM, whose marginals drive an entropy coder.

Structure and parameters are learned in :mod:`hclt`, marginals computed in :mod:`circuit`; here they meet the entropy coder.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Self

import constriction
import numpy as np

from tersor import Codec, InputError, between, field, method, one_of, positive, track
from tersor_pc_lossless.circuit import UNIT, Circuit, integers
from tersor_pc_lossless.hclt import Tree, chow_liu, expectation, initial, maximization, mutual_information

FAMILY, BYTE = constriction.stream.model.Categorical(perfect=False), constriction.stream.model.Uniform(256)
MARK = 0xA5  # between chunks of tiles: a stream cut short, or of something else, is not decoded to its end


@method
class PCLossless(Codec):
    """Lossless image codec driven by a probabilistic circuit (Liu, Mandt and Van den Broeck, "Lossless Compression with
    Probabilistic Circuits", ICLR 2022, https://arxiv.org/abs/2111.11632, sections 3 and 4).

    Takes 8-bit images: C x H x W, or a batch N x C x H x W (domain ``video``), float16/32/64 with every value k/255; exact.
    The circuit is a hidden Chow-Liu tree over the values of one tile; images of another height or width are cut into tiles
    (edges repeated), and with a one-channel circuit the channels are tiles of their own. Values that were not seen in training
    are coded behind an escape symbol; a stream longer than the plain bytes gives way to these. A batch shares one stream.
    ``schedule`` changes the time taken, never the stream.

    The shipped state is a circuit for 8 x 8 digits (the first 1,500 of scikit-learn's). ``fit`` learns one from samples of one
    shape, or of any with ``tile``. Raises InputError for values off the grid, other channel counts, samples above 4,096 values.
    """

    name = "pc-lossless"
    domains = ("image", "video")
    native = "numpy"
    lossless = True
    bitwise = True
    fitted = True

    latents: int = field(32, between(2, 256), help="states of each latent variable")
    epochs: int = field(10, between(0, 10000), help="passes of mini-batch EM, step size falling from 0.2 to 0.02")
    full: int = field(1, between(0, 10000), help="passes of full-batch EM after these")
    batch: int = field(256, positive, help="samples in a mini-batch")
    smoothing: float = field(0.02, positive, help="pseudocounts of a row of a table, as a fraction of the samples for each state")
    tile: int | None = field(None, between(1, 64), help="side of the squares, in pixels, that samples are cut into")
    seed: int = field(0, between(0, 2**31), help="seed of the initial clusters and the order of the samples")
    schedule: str = field("tour", one_of("tour", "cached", "naive"), help="which marginals are kept between variables")

    def _fit(self, samples: list[np.ndarray]) -> dict[str, np.ndarray]:
        pixels = [_bytes(s, s.dtype.name).reshape(-1, *s.shape[-3:]) for s in samples]
        shapes = {p.shape[1:] if self.tile is None else (p.shape[1], self.tile, self.tile) for p in pixels}
        tile = min(shapes)
        if len(shapes) > 1 or np.prod(tile) > 4096:
            raise InputError(f"pc-lossless: samples of {sorted(shapes)}; allowed: one shape of at most 4096 values, or tile=")
        raw = np.concatenate([_cut(p, tile) for p in pixels])
        alphabet, x = np.unique(raw, return_inverse=True)
        x, (n, d), m = x.reshape(raw.shape), raw.shape, len(alphabet) + 1
        levels = min(m, max(2, 3072 // d))
        tree, rng = Tree(chow_liu(mutual_information(x[:20000] * levels // m, levels))), np.random.default_rng(self.seed)
        marginal = np.stack([np.bincount(column, minlength=m) for column in x.T]) + np.float32(0.1)
        marginal /= marginal.sum(-1, keepdims=True)
        p, size = initial(tree, x, marginal, self.latents, rng), min(n, self.batch)
        rates = iter(np.linspace(0.2, 0.02, max(1, self.epochs * (n // size)), dtype=np.float32))
        for _ in track(range(self.epochs), "mini-batch EM"):
            for rows in rng.permutation(n)[: n - n % size].reshape(-1, size):
                new = maximization(expectation(tree, p, x[rows])[1], marginal, self.smoothing * size / self.latents)
                rate = next(rates)
                p = {k: (1 - rate) * p[k] + rate * new[k] for k in p}
        for _ in track(range(self.full), "full-batch EM"):
            parts = [expectation(tree, p, x[i : i + size])[1] for i in range(0, n, size)]
            p = maximization({k: sum(c[k] for c in parts) for k in p}, marginal, self.smoothing * n / self.latents)
        tables = {k: integers(p[k], UNIT[k]).astype(np.uint32 if k == "emission" else np.uint16) for k in UNIT}
        return {"parent": tree.parent, "tile": np.array(tile, np.int32), "alphabet": alphabet, **tables}

    def _default_state(self) -> Path | None:
        return Path(__file__).with_name("digits.safetensors") if self == type(self)(schedule=self.schedule) else None

    @cached_property
    def circuit(self) -> Circuit:
        return Circuit(self.state)

    def _encode(self, x: np.ndarray, spec: Any) -> dict[str, Any]:
        shape, _ = self._layout(spec.shape)
        escape, coder = len(self.circuit.alphabet), constriction.stream.queue.RangeEncoder()
        lookup = np.full(256, escape, np.int32)
        lookup[self.circuit.alphabet] = range(escape)
        plain = _bytes(x, spec.dtype)
        pixels = _cut(plain.reshape(shape), self.circuit.tile)

        def step(table: np.ndarray, v: int) -> np.ndarray:
            coder.encode(np.ascontiguousarray(symbols[:, v]), FAMILY, table)
            return symbols[:, v]

        for i, raw in enumerate(np.split(pixels, range(self.circuit.chunk, len(pixels), self.circuit.chunk))):
            if i:
                coder.encode(MARK, BYTE)
            symbols = lookup[raw]
            self.circuit.run(len(raw), step, self.schedule)
            coder.encode(raw[symbols == escape].astype(np.int32), BYTE)
        stream = coder.get_compressed()
        return {"stream": stream} if stream.nbytes < plain.nbytes else {"plain": plain}  # not the circuit's kind of image

    def _decode(self, parts: dict[str, Any], spec: Any) -> np.ndarray:
        if "plain" in parts:
            return _grid(spec.dtype)[parts["plain"].reshape(spec.shape)]
        shape, grid = self._layout(spec.shape)
        coder = constriction.stream.queue.RangeDecoder(np.array(parts["stream"], np.uint32))
        pixels = np.empty((int(np.prod(grid)), int(np.prod(self.circuit.tile))), np.uint8)
        for i, raw in enumerate(np.split(pixels, range(self.circuit.chunk, len(pixels), self.circuit.chunk))):
            if i and coder.decode(BYTE) != MARK:
                raise ValueError("the stream is out of step")
            symbols = self.circuit.run(len(raw), lambda table, v: coder.decode(FAMILY, table), self.schedule)
            raw[:] = np.append(self.circuit.alphabet, 0)[symbols]
            escaped = symbols == len(self.circuit.alphabet)
            raw[escaped] = coder.decode(BYTE, int(escaped.sum()))
        (c, h, w), (t, q, i, j) = self.circuit.tile, grid
        pixels = pixels.reshape(t, q, i, j, c, h, w).transpose(0, 1, 4, 2, 5, 3, 6).reshape(t, q * c, i * h, j * w)
        return _grid(spec.dtype)[pixels[:, :, : shape[2], : shape[3]]].reshape(spec.shape)

    def _layout(self, given: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape as N x C x H x W, and how many tiles it has along each of these."""
        (c, h, w), (n, channels, height, width) = self.circuit.tile, ((1, *given))[-4:]
        grid = (n, channels // c, -(-height // h), -(-width // w))
        if channels % c:
            raise InputError(f"pc-lossless: {channels} channels given; allowed: multiples of {c}, as the circuit was fitted")
        if np.prod(grid, dtype=float) * c * h * w > 16 * np.prod(given, dtype=float) + 2**20:
            raise InputError(f"pc-lossless: an image of {height} x {width} is too thin for tiles of {h} x {w}")
        return (n, channels, height, width), grid

    @classmethod
    def examples(cls) -> list[Self]:
        rng = np.random.default_rng(0)
        steps = np.cumsum(rng.integers(-1, 2, (40, 1, 4, 4)), -1) * 30 + 120
        small = cls(latents=3, epochs=2, full=1).fit(list(steps.clip(0, 255).astype(np.float32) / np.float32(255)))
        return [cls(), small, cls(latents=2, epochs=1, schedule="cached", tile=2).fit(np.eye(5, dtype=np.float32)[None, None])]


def _bytes(x: np.ndarray, dtype: str) -> np.ndarray:
    """The bytes k of an image of values k/255; it must be what ``_grid`` gives for them to the last bit."""
    k = np.rint(x.astype(np.float32) * 255).astype(np.uint8)
    if dtype == "bfloat16" or _grid(dtype)[k].tobytes() != x.tobytes():
        raise InputError("pc-lossless takes 8-bit images, float16, float32 or float64 with every value k/255; given: others")
    return k


def _grid(dtype: str) -> np.ndarray:
    return np.arange(256, dtype=dtype) / np.dtype(dtype).type(255)


def _cut(x: np.ndarray, tile: tuple[int, ...]) -> np.ndarray:
    """N x C x H x W in tiles of C x H x W, edges repeated where they do not fit: tiles x D."""
    (n, channels, height, width), (c, h, w) = x.shape, tile
    x = np.pad(x, ((0, 0), (0, 0), (0, -height % h), (0, -width % w)), mode="edge")
    return x.reshape(n, channels // c, c, -1, h, x.shape[3] // w, w).transpose(0, 1, 3, 5, 2, 4, 6).reshape(-1, c * h * w)
