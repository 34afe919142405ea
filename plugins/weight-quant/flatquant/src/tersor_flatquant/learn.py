"""Learning the transforms and the clipping thresholds of a group of layers, or of a whole block, from its output error."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tersor.model.statistics import columns, thin_layers, transposed
from tersor_flatquant.rounding import asymmetric, clip_of, row_clips, symmetric
from tersor_flatquant.transforms import Affine, Fixed, Invertible, factors

#: Exponents of the weights in the first scale of a channel, |W|^(1 - a) / |x|^a, as the authors have it.
ALPHA = 0.3
SOME = 512  # rows of a layer's inputs that thresholds and scales start from
FEW = 4  # calibration inputs that are looked at where nothing is learned
MOST = 0.995  # the largest threshold that training starts from: beyond it a sigmoid hardly moves


def logit(ratio: Any) -> Tensor:
    """What the sigmoid takes to a ratio."""
    return torch.logit(torch.as_tensor(ratio, dtype=torch.float32).clamp(max=MOST))


class Layer(nn.Module):
    """One linear layer in training. ``weight``: out x in, float32; ``transform``: its group's; ``value``: of its output's heads."""

    def __init__(self, m: Any, weight: Tensor, bias: Tensor | None, transform: Any, value: Any = None) -> None:
        super().__init__()
        self.bits, self.act_bits, self.original, self.bias = m.bits, m.act_bits, weight, bias
        self.transform, self.value = transform, value

    @torch.no_grad()
    def start(self, seen: Tensor) -> None:
        """Thresholds of the least squared error. ``seen``: some of the layer's inputs, rows x in."""
        self.rows = nn.Parameter(logit(row_clips(self.turned(), self.bits)))
        ratio = clip_of(self.transform(seen), self.act_bits) if self.act_bits < 16 else 1.0
        self.act = nn.Parameter(logit(ratio).to(seen.device))

    def turned(self) -> Tensor:
        """The weight in the space of the transforms."""
        w = self.transform.weight(self.original)
        return w if self.value is None else Heads.fuse(w, self.value.now[0])

    def begin(self) -> None:
        """Quantize the weight, once for each step."""
        self.now = symmetric(self.turned(), self.bits, self.rows.sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for transformed inputs."""
        if self.act_bits < 16:
            x = symmetric(x, self.act_bits, self.act.sigmoid())
        y = x @ self.now.T
        if self.value is not None:
            y = self.value.apart(y)
        return y if self.bias is None else y + self.bias


class Heads(nn.Module):
    """The transform of a head's keys or values, with the thresholds of their quantizer (section 3.2; dim x dim)."""

    def __init__(self, width: int, kind: str, bits: int, seed: int, generator: torch.Generator) -> None:
        super().__init__()
        self.width, self.bits = width, bits
        self.learned = Invertible(width, generator) if kind == "learned" else None
        self.fixed = Fixed(width, kind, seed)
        self.clip = nn.Parameter(logit([1.0, 1.0]))

    def begin(self) -> None:
        """Compute the matrix and its transposed inverse, once for each step."""
        if self.learned is not None:
            self.now = self.learned()
        else:
            self.now = (self.fixed(torch.eye(self.width, device=self.clip.device)),) * 2

    def start(self, seen: Tensor) -> None:
        """Thresholds of the least squared error. ``seen``: keys or values, ... x dim."""
        self.to(seen.device)
        self.begin()
        self.clip.data.fill_(float(logit(clip_of(seen @ self.now[0].detach(), self.bits, True))))

    @staticmethod
    def fuse(w: Tensor, matrix: Tensor) -> Tensor:
        """The rows of a weight, out x in, as they give transformed heads. ``matrix``: dim x dim."""
        return (matrix.T @ w.unflatten(0, (-1, matrix.shape[0]))).flatten(0, 1)

    def apart(self, y: Tensor) -> Tensor:
        """Heads, ... x out, back from the transform."""
        return (y.unflatten(-1, (-1, self.width)) @ self.now[1].T).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        """Keys or values, ... x dim, transformed, quantized and brought back."""
        x = asymmetric(x @ self.now[0], self.bits, self.clip.sigmoid())
        return x @ self.now[1].T


class Block:
    """What training needs of a block: which layers see the same inputs, what these are, and the quantized layers in their places.

    ``others``: layers that are learned alone (convolutions), of which only inputs are gathered, as ``self.others``: names to weight and
    rows. ``calls``: functions that run the block on one of the inputs, with a cache in the place of its own or None.
    """

    def __init__(
        self, m: Any, layers: dict[str, nn.Module], others: dict[str, nn.Module], calls: list[Callable[[Any], Tensor]]
    ) -> None:
        self.m, self.modules = m, layers
        self.calls = calls if m.transform == "learned" else calls[:FEW]
        self.generator = torch.Generator().manual_seed(m.seed)
        self._look({**layers, **others})
        self._build()
        self.others = {n: (_weight(others[n]), torch.cat(self.inputs[self.shared[n]])) for n in self.order if n in others}

    @torch.no_grad()
    def _look(self, layers: dict[str, nn.Module]) -> None:
        """One pass over the data: the outputs to aim at, the layers' inputs, keys and values."""
        self.shared: dict[str, int] = {}  # layers to groups
        self.inputs: list[list[Tensor]] = []
        self.order: list[str] = []
        self.cached: list[tuple[Tensor, Tensor]] = []
        latest: dict[str, Any] = {}

        def hook(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            twin = next((n for n, other in latest.items() if other is x), None)
            latest[name] = x
            if name not in self.shared:
                self.shared[name] = len(self.inputs) if twin is None else self.shared[twin]
                self.order.append(name)
                if twin is None:
                    self.inputs.append([])
            if twin is None:
                rows = columns(module, x)
                self.inputs[self.shared[name]].append(rows[:: max(1, len(rows) * len(self.calls) // SOME)].clone())

        handles = [
            layer.register_forward_pre_hook(lambda layer, args, name=name: hook(name, layer, args))
            for name, layer in layers.items()
        ]
        watch = _Cache(lambda k, v: self.cached.append((k[..., ::8, :], v[..., ::8, :])))
        self.targets = []
        try:
            for call in self.calls:
                latest.clear()
                self.targets.append(call(watch))
        finally:
            for handle in handles:
                handle.remove()

    def _build(self) -> None:
        m, kind = self.m, self.m.transform
        self.heads: dict[str, Heads] = {}
        if self.cached and m.kv_bits < 16:
            for place, role in enumerate(("k_proj", "v_proj")):
                name = next((n for n in self.order if n.endswith(f"{role}.weight")), None)
                if name is not None:
                    seen = torch.cat([pair[place].flatten(0, -2) for pair in self.cached])
                    self.heads[role] = Heads(seen.shape[-1], kind, m.kv_bits, m.seed, self.generator)
                    self.heads[role].start(seen)
        self.layers: dict[str, Layer] = {}
        self.groups: list[Any] = []
        for group, rows in enumerate(self.inputs):
            seen = torch.cat(rows)
            names = [n for n in self.order if self.shared[n] == group and n in self.modules]
            if not names:
                continue
            weights = {n: _weight(self.modules[n]) for n in names}
            transform: Any
            if kind != "learned":
                transform = Fixed(seen.shape[1], kind, m.seed)
            else:
                value = self.heads.get("v_proj")
                if value is not None and names[0].endswith("o_proj.weight") and seen.shape[1] % value.width == 0:
                    # attention's outputs are heads x dim, and the right factor is the values' own transform
                    left = Invertible(seen.shape[1] // value.width, self.generator)
                    transform = Affine(left, value.learned, None)  # type: ignore[arg-type]
                else:
                    sides = [Invertible(n, self.generator) for n in factors(seen.shape[1])]
                    transform = Affine(*sides, first_scale(list(weights.values()), seen))
            transform.to(seen.device)
            transform.begin()
            self.groups.append(transform)
            for n in names:
                value = self.heads.get("v_proj") if n.endswith("v_proj.weight") else None
                bias = getattr(self.modules[n], "bias", None)
                self.layers[n] = Layer(m, weights[n], None if bias is None else bias.detach(), transform, value)
                self.layers[n].start(seen)

    def _begin(self) -> None:
        self.seen: Any = None  # the latest input of a layer, its transform, and what came of it
        for part in (*self.heads.values(), *self.groups, *self.layers.values()):
            part.begin()

    def train(self, steps: int) -> None:
        """Minimise the squared error of the block's output (equation 3): AdamW, cosine schedule, thresholds at ten times the rate."""
        m = self.m
        parts = nn.ModuleList([*self.heads.values(), *self.groups, *self.layers.values()])
        named = dict(parts.named_parameters())
        clips = [p for n, p in named.items() if n.rpartition(".")[2] in ("rows", "act", "clip")]
        others = [p for n, p in named.items() if n.rpartition(".")[2] not in ("rows", "act", "clip")]
        optimizer = torch.optim.AdamW([{"params": others, "lr": m.lr}, {"params": clips, "lr": 10 * m.lr}])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-3 * m.lr)
        cache = _Cache(self._quantize_cache) if self.heads else None
        order: list[int] = []
        self._replace()
        try:
            for _ in range(steps):
                if not order:
                    order = torch.randperm(len(self.calls), generator=self.generator).tolist()
                i = order.pop()
                self._begin()
                loss = (self.calls[i](cache) - self.targets[i]).square().mean()
                size = loss.detach()
                if not math.isfinite(float(size)) or float(size) == 0.0:
                    continue
                gradients = torch.autograd.grad(loss / size, list(named.values()), allow_unused=True)
                for p, g in zip(named.values(), gradients, strict=True):
                    p.grad = g
                optimizer.step()
                schedule.step()
        finally:
            for module in self.modules.values():
                module.__dict__.pop("forward", None)
            self.seen = None

    def _quantize_cache(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found = [self.heads[n](x) if n in self.heads else x for n, x in (("k_proj", keys), ("v_proj", values))]
        return found[0], found[1]

    def _replace(self) -> None:
        """Let the quantized layers compute in the places of the block's own."""

        def forward(x: Tensor, layer: Layer) -> Tensor:
            if self.seen is None or self.seen[0] is not x or self.seen[1] is not layer.transform:
                self.seen = (x, layer.transform, layer.transform(x))
            return layer(self.seen[2])

        for name, layer in self.layers.items():
            self.modules[name].forward = lambda x, layer=layer: forward(x, layer)  # type: ignore[method-assign]

    @torch.no_grad()
    def results(self) -> dict[str, dict[str, Any]]:
        """What is to be stored of each layer beside its codes; names without ``.weight``'s values."""
        out: dict[str, dict[str, Any]] = {}
        self._begin()
        for name, layer in self.layers.items():
            found: dict[str, Any] = {**layer.transform.parts(), "rows": layer.rows.sigmoid()}
            if self.m.act_bits < 16:
                found["clip"] = float(layer.act.sigmoid())
            for role, part in (("k_proj", "key"), ("v_proj", "value")):
                if role in self.heads and name.endswith(f"{role}.weight"):
                    found[part] = self.heads[role].now[0].half()
                    found["cache"] = self.heads[role].clip.sigmoid().tolist()
            out[name] = found
        return out


class _Cache:
    """Stands in the place of a transformers cache while a block runs: shows, or changes, the keys and values."""

    def __init__(self, change: Callable[[Tensor, Tensor], Any]) -> None:
        self.change = change

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys after the rotary embedding, and values: batch x heads x tokens x dim."""
        return self.change(keys, values) or (keys, values)


def layers_in(layers: dict[str, nn.Module]) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Linear layers, which are learned together, and the others, which are learned alone."""
    thin = {n: m for n, m in layers.items() if isinstance(m, thin_layers())}
    return thin, {n: m for n, m in layers.items() if n not in thin}


def block_calls(view: Any) -> list[Callable[[Any], Tensor]]:
    """For each input of a view what runs its block; takes a cache or None. Blocks that know no cache get none."""
    takes = "past_key_values" in inspect.signature(view.module.forward).parameters

    def run(i: int, cache: Any) -> Tensor:
        if not view.block:
            out = view.run(i)
        else:
            args, kwargs = view.inputs[i]
            out = view.module(*args, **({**kwargs, "past_key_values": cache} if takes and cache is not None else kwargs))
        for name in ("last_hidden_state", "logits"):
            out = getattr(out, name, out)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    return [lambda cache, i=i: run(i, cache) for i in range(len(view))]  # type: ignore[misc]


def first_scale(weights: list[Tensor], seen: Tensor) -> Tensor:
    """The channels' scales that training starts from: |W|^(1 - a) / |x|^a of the largest magnitudes, 1 in the geometric mean."""
    largest, widest = seen.abs().amax(0), torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    floor = 2.0**-12
    largest = largest.clamp(min=float(largest.max()) * floor) if float(largest.max()) > 0 else torch.ones_like(largest)
    widest = widest.clamp(min=float(widest.max()) * floor) if float(widest.max()) > 0 else torch.ones_like(widest)
    scale = (1 - ALPHA) * widest.log2() - ALPHA * largest.log2()
    return (scale - scale.mean()).exp2()


def _weight(module: nn.Module) -> Tensor:
    w = module.weight.detach()  # type: ignore[union-attr]
    return (w.T if transposed(module) else w.flatten(1)).float()
