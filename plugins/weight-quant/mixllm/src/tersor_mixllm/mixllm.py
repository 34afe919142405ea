"""MixLLM: LLM Quantization with Global Mixed-precision between Output-features and Highly-efficient System Design
(https://arxiv.org/abs/2412.14590)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from tersor import Calibration, CalibrationError, ConfigError, Quantizer, Spec, Uniform, between, field, method, one_of
from tersor_kit_weight_quant import (
    Grid,
    exponent_of,
    fit_grid,
    gram,
    group_count,
    load,
    normalise,
    pack,
    store,
    unit_factor,
    unpack,
)
from tersor_mixllm.layer import MixedLinear
from tersor_mixllm.rounding import gptq, group_order

if TYPE_CHECKING:
    from tersor.model.statistics import View


@method
class MixLLM(Quantizer):
    """The rows (output features) that matter most to the network's loss have 8 bits, all others 4, in groups of 128 columns.

    1. Global salience: with the rows rounded to ``bits`` bits, c0 to c, the loss of a sequence changes by about
       |g (c - c0) + 1/2 (g (c - c0))^2|, g being the row's gradient: first order, and second with Fisher's gg' for the Hessian. It is
       summed over the calibration sequences. The ``high`` fraction of the rows of all layers with the largest sum get ``high_bits``.
       ``share="layer"`` gives every layer the same fraction instead, by the same measure, for comparison.
    2. Rounding, as in the authors' code (microsoft/MixLLM): both parts of a layer by GPTQ, whole groups in the order of their inputs' energy, each group's range
       shrunk by the ratio, out of 1, 0.98, ..., 0.8, that costs the least output error of the group. The rows of ``bits`` bits are
       asymmetric, those of ``high_bits`` symmetric.
    3. Two-step dequantization: see :mod:`tersor_mixllm.layer`, the layer that ``compress_layers`` puts into a network.
       It computes with 8-bit activations; decoding gives weights alone.

    Weights: float, out x in. Calibration: the layer's inputs or their X'X; the salience comes from the study of the network, as
    ``extra["salient"]``, a boolean for each row. On a single matrix without it a row's salience is the output error that rounding to
    nearest leaves in it, and the layer has its own ``high`` fraction of salient rows.

    Stored: one bit for each row, and for each of the two parts codes, scales in float16 and (low part) zero points.

    Raises :class:`tersor.ConfigError` for a group size of 0 or below -1 or ``high_bits`` below ``bits``,
    :class:`tersor.InputError` for NaN and infinity in the weights, :class:`tersor.CalibrationError` for calibration data that is
    missing, of another width, all zero, not finite or not positive definite, and for networks that give no loss.
    """

    name = "mixllm"
    domains = ("weight",)
    native = "torch"
    calibration = "required"
    studies = "network"

    bits: int = field(4, between(2, 8), help="bits per weight of most rows")
    high_bits: int = field(8, between(2, 8), help="bits per weight of the salient rows")
    high: float = field(0.1, between(0, 1), help="fraction of the rows that are salient")
    share: str = field("network", one_of("network", "layer"), help="whether rows compete in the whole network or in each layer")
    group_size: int = field(128, help="weights of a row that share a scale; -1: a whole row")
    clip: bool = field(True, help="search the range of each group for the least output error")
    damp: float = field(0.01, between(0, 1), help="damping, as a fraction of the Hessian's mean diagonal")

    def __attrs_post_init__(self) -> None:
        if self.group_size < 1 and self.group_size != -1:
            raise ConfigError(f"mixllm: group_size={self.group_size} is not allowed; allowed: 1 or more, or -1 for a whole row")
        if self.high_bits < self.bits:
            raise ConfigError(f"mixllm: high_bits={self.high_bits} is below bits={self.bits}; allowed: {self.bits} to 8")

    @classmethod
    def examples(cls) -> list[Self]:
        """For the conformance kit."""
        return [cls(group_size=4), cls(bits=3, high_bits=6, high=0.5, group_size=-1, clip=False), cls(high=0.0, group_size=3)]

    # -- 1. global salience

    def _study(self, view: View) -> Mapping[str, Mapping[str, Any]]:
        """The salient rows of each layer, from one backward pass for each batch; holds one float32 for each weight."""
        found = self._salience(view)
        names = list(found)
        sizes = [len(s) for s in found.values()]
        scores = [torch.cat(list(found.values()))] if self.share == "network" else list(found.values())
        salient = torch.cat([self._largest(s) for s in scores])
        return {name: {"salient": mask} for name, mask in zip(names, salient.split(sizes), strict=True)}

    def _salience(self, view: View) -> dict[str, Tensor]:
        from tersor.model.statistics import transposed

        def rows(value: Tensor, layer: nn.Module) -> Tensor:
            return (value.T if transposed(layer) else value).flatten(1).float()

        scores: dict[str, Tensor] = {}
        handles = []
        flags = [(p, p.requires_grad, p.grad) for p in view.module.parameters()]
        try:
            for p, _, _ in flags:
                p.requires_grad_(False)
            for name, layer in view.layers.items():
                weight = layer.weight
                w = rows(weight.detach(), layer)
                change = self._nearest(w) - w
                scores[name] = torch.zeros(len(w), device=w.device)

                def add(p: Tensor, name: str = name, layer: nn.Module = layer, change: Tensor = change) -> None:
                    first = torch.linalg.vecdot(rows(p.grad, layer), change)  # type: ignore[arg-type]
                    scores[name] += (first + first.square() / 2).abs()
                    p.grad = None

                weight.grad = None
                weight.requires_grad_(True)
                handles.append(weight.register_post_accumulate_grad_hook(add))
            for i in range(len(view)):
                loss = view.loss(i)
                if not bool(torch.isfinite(loss)):
                    raise CalibrationError(
                        f"mixllm: the network's loss on calibration batch {i} is {float(loss):g}; allowed: a number"
                    )
                loss.backward()
        finally:
            for handle in handles:
                handle.remove()
            for p, flag, grad in flags:
                p.requires_grad_(flag)
                p.grad = grad
        return scores

    def _nearest(self, weight: Tensor) -> Tensor:
        """A weight (out x in, float32) rounded to ``bits`` bits."""
        grid = fit_grid(weight, self.bits, self.group_size, False)
        return grid.dequantize(grid.quantize(weight))

    def _largest(self, scores: Tensor) -> Tensor:
        """True for the ``high`` fraction of the scores."""
        out = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        out[scores.topk(round(self.high * len(scores))).indices] = True
        return out

    # -- 2. rounding

    def _quantize(self, x: Tensor, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        hessian = gram(calibration, x.shape[1])
        salient = self._salient(x, hessian, calibration)
        size = self._size(x.shape[1])
        order = group_order(hessian.diagonal(), size)
        factor = unit_factor(hessian, order, self.damp)
        hessian = hessian[order][:, order]
        exponent = exponent_of(x)
        columns = normalise(x, exponent).T.contiguous()[order]
        columns[hessian.diagonal() == 0] = 0.0

        parts: dict[str, Any] = {"salient": pack(salient.to(torch.uint8), 1)}
        for part, mask, bits, sym in self._parts(salient):
            if bool(mask.any()):
                grid, codes = gptq(columns[:, mask], factor, hessian, order, bits, size, sym, self.clip, exponent)
                parts |= {f"{part}_{key}": value for key, value in store(grid, codes).items()}
        return parts

    def _parts(self, salient: Tensor) -> Iterator[tuple[str, Tensor, int, bool]]:
        """Name, rows, bits and symmetry of the two parts of a layer."""
        yield "low", ~salient, self.bits, False
        yield "high", salient, self.high_bits, True

    def _salient(self, x: Tensor, hessian: Tensor, calibration: Calibration | None) -> Tensor:
        told = None if calibration is None else calibration.extra.get("salient")
        if told is None:
            change = (self._nearest(x) - x) / x.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
            scale = hessian.diagonal().amax().clamp(min=torch.finfo(torch.float32).tiny)
            return self._largest(torch.linalg.vecdot(change @ (hessian / scale), change))
        told = torch.as_tensor(told)
        if told.dtype != torch.bool or tuple(told.shape) != (len(x),):
            raise CalibrationError(
                f"mixllm: extra['salient'] is {told.dtype} of shape {tuple(told.shape)}; allowed: a boolean for each of {len(x)} rows"
            )
        return told

    def _size(self, columns: int) -> int:
        return max(columns, 1) if self.group_size == -1 else self.group_size

    # -- decoding

    def _load(self, parts: dict[str, Any], spec: Spec) -> Iterator[tuple[Tensor, Grid, Tensor]]:
        """Rows, grid and codes of each part that there is."""
        rows, columns = spec.shape
        salient = unpack(parts["salient"], 1, rows).bool()
        for part, mask, bits, sym in self._parts(salient):
            count = int(mask.sum())
            if count:
                mine = {key.removeprefix(f"{part}_"): v for key, v in parts.items() if key.startswith(f"{part}_")}
                yield mask, *load(mine, (count, columns), bits, self.group_size, sym)

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        out = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        for mask, grid, codes in self._load(parts, spec):
            out[mask] = grid.dequantize(codes, out.dtype)
        return out

    def _uniform(self, parts: dict[str, Any], spec: Spec) -> Uniform | None:
        """Levels of ``high_bits`` bits, of which rows of ``bits`` bits use the lowest."""
        size = self._size(spec.shape[1])
        codes = torch.empty(spec.shape, dtype=torch.uint8)
        scale = torch.empty(spec.shape[0], group_count(spec.shape[1], size))
        zero = torch.full(scale.shape, 2.0 ** (self.high_bits - 1))
        for mask, grid, levels in self._load(parts, spec):
            part = grid.uniform(levels)
            codes[mask], scale[mask] = part.codes, part.scale
            if part.zero is not None:
                zero[mask] = part.zero
        return Uniform(codes, scale, zero, self.high_bits, size)

    def _module(self, parts: dict[str, Any], spec: Spec, bias: Tensor | None, layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, nn.Linear) or self.bits > 7:  # 8-bit codes without their zero point are no int8
            return None
        return MixedLinear(parts, spec, self, bias)
