"""Entropy coding of an integer latent, with a context model that is integer arithmetic from end to end.

Positions are visited coarse to fine (as in an interlaced image): each pass doubles the resolution, and each new position is
predicted from the already known ones around it, and from the earlier channels at its own position. A prediction is a mean (in
quarters) and a scale class, both from integer weights; together they pick one of the integer frequency tables of the state, and
`constriction` does the range coding. Sums are formed in float64 on integers far below 2**53, hence exact on every machine.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache

import constriction
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersor import track
from tersor_walloc.network import LIMIT

UNIT = 4096  # fixed-point one of the context weights
CLASSES, QUARTERS, SYMBOLS = 36, 4, 4 * LIMIT + 1
BASE = 64  # the widest stride: positions on this grid have no neighbours to look at
Array = NDArray[np.float64]
Pass = tuple[int, NDArray[np.int64], NDArray[np.int64]]  # weight set, positions n, neighbours m x n, as flat indices
# A visitor codes some values of one channel: (own values or None, integer means, table numbers) -> the values.
Visitor = Callable[[Array | None, Array, NDArray[np.int64]], Array]


def groups(axes: int) -> int:
    """How many sets of context weights there are: the base grid, then fine and coarse passes of each kind."""
    return 5 if axes == 2 else 3


@lru_cache(maxsize=8)
def schedule(height: int, width: int, axes: int) -> tuple[Pass, ...]:
    """The passes over a grid, in coding order."""

    def grid(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)

    def mirror(index: NDArray[np.int64], offset: int, size: int) -> NDArray[np.int64]:
        moved = index + offset
        moved = np.where((moved < 0) | (moved >= size), index - offset, moved)
        return np.where((moved < 0) | (moved >= size), index, moved)  # itself: not known yet, reads as zero

    def one(kind: int, spots: NDArray[np.int64], offsets: list[tuple[int, int]]) -> Pass:
        near = [mirror(spots[:, 0], i, height) * width + mirror(spots[:, 1], j, width) for i, j in offsets]
        return kind, spots[:, 0] * width + spots[:, 1], np.array(near).reshape(len(offsets), -1)

    rows, columns = np.arange(0, height, BASE), np.arange(0, width, BASE)
    passes = [one(0, grid(rows, columns), [(0, 0)] * (2 * axes))]
    step = BASE // 2
    while step:
        fine = int(step == 1)
        old_rows, new_rows = np.arange(0, height, 2 * step), np.arange(step, height, 2 * step)
        old_columns, new_columns = np.arange(0, width, 2 * step), np.arange(step, width, 2 * step)
        if axes == 1:
            passes.append(one(1 + fine, grid(old_rows, new_columns), [(0, -step), (0, step)]))
        else:
            diagonal = [(-step, -step), (-step, step), (step, -step), (step, step)]
            direct = [(-step, 0), (step, 0), (0, -step), (0, step)]
            passes.append(one(1 + 2 * fine, grid(new_rows, new_columns), diagonal))
            spots = np.concatenate((grid(old_rows, new_columns), grid(new_rows, old_columns)))
            passes.append(one(2 + 2 * fine, spots, direct))
        step //= 2
    return tuple(p for p in passes if len(p[1]))


def walk(state: dict[str, NDArray], latent: Array | None, shape: tuple[int, int, int], axes: int, visit: Visitor) -> Array:
    """Visit every value of a channels x height x width latent in coding order; encoder and decoder share this loop."""
    channels, height, width = shape
    known = np.zeros((channels, height * width))
    for kind, spots, near in schedule(height, width, axes):
        mean_weight, scale_weight = state["mean_weight"][kind], state["scale_weight"][kind]
        around = known[:, near].transpose(1, 0, 2).reshape(len(near) * channels, -1)
        mean = mean_weight[:, channels:] @ around + state["mean_bias"][kind][:, None]
        scale = scale_weight[:, channels:] @ np.abs(around) + state["scale_bias"][kind][:, None]
        here, magnitude = np.zeros((channels, len(spots))), np.zeros((channels, len(spots)))
        for c in range(channels):
            quarter = np.floor((mean[c] + mean_weight[c, :c] @ here[:c]) * (QUARTERS / UNIT) + 0.5)
            quarter = np.clip(quarter, -QUARTERS * LIMIT, QUARTERS * LIMIT)
            whole = np.floor((quarter + QUARTERS // 2) / QUARTERS)
            level = np.searchsorted(state["thresholds"], scale[c] + scale_weight[c, :c] @ magnitude[:c])
            table = level * QUARTERS + (quarter - QUARTERS * whole).astype(np.int64) + QUARTERS // 2
            here[c] = visit(None if latent is None else latent[c, spots], whole, table)
            magnitude[c] = np.abs(here[c])
        known[:, spots] = here
    return known


def _runs(table: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Positions by table: one call of the range coder for each table in use."""
    order = np.argsort(table, kind="stable")
    edges = np.flatnonzero(np.diff(table[order], prepend=-1))
    for part in np.split(order, edges[1:]):
        if len(part):
            yield int(table[part[0]]), part


class LatentCoder:
    """Encodes and decodes integer latents (channels x height x width, -127..127) with the tables of a state."""

    def __init__(self, state: dict[str, Tensor], axes: int) -> None:
        wanted = ("mean_weight", "mean_bias", "scale_weight", "scale_bias", "thresholds")
        self.state = {key: state[f"coder.{key}"].numpy().astype(np.float64) for key in wanted}
        self.tables = state["coder.tables"].numpy().astype(np.float64)
        self.axes = axes
        self._models: dict[int, constriction.stream.model.Categorical] = {}

    def _model(self, table: int) -> constriction.stream.model.Categorical:
        if table not in self._models:
            self._models[table] = constriction.stream.model.Categorical(self.tables[table], perfect=False)
        return self._models[table]

    def encode(self, latent: NDArray[np.int8]) -> NDArray[np.uint32]:
        coder = constriction.stream.queue.RangeEncoder()

        def visit(values: Array | None, whole: Array, table: NDArray[np.int64]) -> Array:
            symbols = (values - whole).astype(np.int32) + 2 * LIMIT
            for number, part in _runs(table):
                coder.encode(symbols[part], self._model(number))
            return values

        walk(self.state, latent.reshape(len(latent), -1).astype(np.float64), latent.shape, self.axes, visit)
        return coder.get_compressed()

    def decode(self, stream: NDArray[np.uint32], shape: tuple[int, int, int]) -> NDArray[np.int8]:
        coder = constriction.stream.queue.RangeDecoder(np.array(stream, dtype=np.uint32))

        def visit(_: Array | None, whole: Array, table: NDArray[np.int64]) -> Array:
            values = np.empty(len(table))
            for number, part in _runs(table):
                values[part] = coder.decode(self._model(number), len(part))
            values += whole - 2 * LIMIT
            if len(values) and np.abs(values).max() > LIMIT:
                raise ValueError(f"a latent value outside -{LIMIT}..{LIMIT}: the stream is damaged")
            return values

        latent = walk(self.state, None, shape, self.axes, visit)
        if not coder.maybe_exhausted():
            raise ValueError("the latent stream goes on after its last value: the stream is damaged")
        return latent.reshape(shape).astype(np.int8)

    def ideal_bits(self, latent: NDArray[np.int8]) -> float:
        """The code length that the tables promise: minus the sum of log2 of each value's probability."""
        cost = -np.log2(self.tables / self.tables.sum(1, keepdims=True))
        total = 0.0

        def visit(values: Array | None, whole: Array, table: NDArray[np.int64]) -> Array:
            nonlocal total
            total += cost[table, (values - whole).astype(np.int64) + 2 * LIMIT].sum()
            return values

        walk(self.state, latent.reshape(len(latent), -1).astype(np.float64), latent.shape, self.axes, visit)
        return total


def _scale(raw: Tensor) -> Tensor:
    return torch.nn.functional.softplus(raw * 4) / 4 + 0.05


def _raw(scale: Tensor) -> Tensor:
    return torch.log(torch.expm1((scale - 0.05) * 4)) / 4


def fit_coder(latents: list[NDArray[np.int8]], axes: int, steps: int = 400, seed: int = 0) -> dict[str, Tensor]:
    """Learn the context weights (by gradient descent on the logistic code length), round them to integers, then count the
    tables over the given latents. Returns the `coder.*` tensors of the state, all integers."""
    channels = len(latents[0])
    features = 2 * axes * channels
    collected: list[list[NDArray]] = [[] for _ in range(groups(axes))]
    for latent in latents:
        flat = latent.reshape(channels, -1).astype(np.float32)
        for kind, spots, near in schedule(latent.shape[1], latent.shape[2], axes):
            own = flat[:, spots].T
            around = flat[:, near].transpose(2, 1, 0) * (kind > 0)
            # a neighbour that mirrors onto its own position is not known when the value is coded
            around = around * (near != spots).T[:, :, None]
            collected[kind].append(np.concatenate((own, around.reshape(len(own), -1)), 1))
    generator = torch.Generator().manual_seed(seed)
    state = {
        "mean_weight": torch.zeros(groups(axes), channels, channels + features),
        "scale_weight": torch.zeros(groups(axes), channels, channels + features),
        "mean_bias": torch.zeros(groups(axes), channels),
        "scale_bias": torch.full((groups(axes), channels), 1.0),
    }
    mask = torch.cat((torch.ones(channels, channels).tril(-1), torch.ones(channels, features)), 1)
    for kind in track(range(groups(axes)), "fitting the context model"):
        if not collected[kind]:
            continue
        rows = torch.from_numpy(np.concatenate(collected[kind]))
        weights = [torch.zeros(channels, channels + features, requires_grad=True) for _ in range(2)]
        biases = [torch.zeros(channels, requires_grad=True), torch.full((channels,), 0.5, requires_grad=True)]
        with torch.no_grad():
            for axis in range(2 * axes):
                weights[1][:, channels * (1 + axis) : channels * (2 + axis)] = 0.5 / (2 * axes) * torch.eye(channels)
        rate = 1e-2
        optimizer = torch.optim.Adam([*weights, *biases], lr=rate, betas=(0.9, 0.99))
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps) + 1e-5
            batch = rows[torch.randint(len(rows), (min(4096, len(rows)),), generator=generator)]
            mean = batch @ (weights[0] * mask).T + biases[0]
            scale = _scale(batch.abs() @ (weights[1] * mask).T + biases[1])
            distance = (batch[:, :channels] - mean).abs()
            mass = torch.sigmoid((0.5 - distance) / scale) - torch.sigmoid((-0.5 - distance) / scale)
            loss = (-torch.log2(mass.clamp_min(1e-9)) + 0.01 * torch.relu(distance / scale - 20)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for key, value in zip(("mean_weight", "scale_weight"), weights, strict=True):
            state[key][kind] = (value * mask).detach()
        state["mean_bias"][kind], state["scale_bias"][kind] = biases[0].detach(), biases[1].detach()
    integers = {key: torch.round(value * UNIT).clamp(-32767, 32767).to(torch.int16) for key, value in state.items()}
    edges = 0.08 * 1.2 ** torch.arange(CLASSES - 1, dtype=torch.float64)
    integers["thresholds"] = torch.round(_raw(edges) * UNIT).to(torch.int32)
    integers["tables"] = _count(latents, axes, {key: v.numpy().astype(np.float64) for key, v in integers.items()}, edges)
    return {f"coder.{key}": value for key, value in integers.items()}


def _count(latents: list[NDArray[np.int8]], axes: int, state: dict[str, NDArray], edges: Tensor) -> Tensor:
    """Frequency tables: counts over the latents, on top of a logistic prior of some 30 observations; each sums to about 2**20."""
    counts = np.zeros((CLASSES * QUARTERS, SYMBOLS))

    def visit(values: Array | None, whole: Array, table: NDArray[np.int64]) -> Array:
        np.add.at(counts, (table, (values - whole).astype(np.int64) + 2 * LIMIT), 1)
        return values

    for latent in latents:
        walk(state, latent.reshape(len(latent), -1).astype(np.float64), latent.shape, axes, visit)
    middle = torch.cat((edges[:1] * 0.8, (edges[1:] * edges[:-1]).sqrt(), edges[-1:] * 1.2))[:, None, None]
    shift = (torch.arange(QUARTERS, dtype=torch.float64) - QUARTERS // 2)[None, :, None] / QUARTERS
    distance = (torch.arange(SYMBOLS, dtype=torch.float64) - 2 * LIMIT - shift).abs()
    prior = torch.sigmoid((0.5 - distance) / middle) - torch.sigmoid((-0.5 - distance) / middle)
    prior = prior.reshape(CLASSES * QUARTERS, SYMBOLS)
    mixed = torch.from_numpy(counts) + 30 * prior / prior.sum(1, keepdim=True)
    return torch.round(mixed / mixed.sum(1, keepdim=True) * 2**20).clamp_min(1).to(torch.int32)
