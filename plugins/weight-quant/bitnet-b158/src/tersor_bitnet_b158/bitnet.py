"""BitNet b1.58 Reloaded: State-of-the-art Performance Also on Smaller Networks (https://arxiv.org/abs/2407.09527)."""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from tersor import Calibration, ConfigError, Quantizer, Spec, Uniform, field, method, one_of
from tersor_kit_weight_quant.int8 import Int8Linear, absmax


@method
class BitNet158(Quantizer):
    """Weights of -1, 0 and 1 times one scale, trained as such, with activations of 8 bits (section 3).

    The scale of a matrix is the mean magnitude of its weights (absmean, as in BitNet b1.58), or the median (absmedian, the paper's
    variant); a weight becomes the nearest of -1, 0, 1 times it:

        s = mean |W|  or  median |W|,        Q = clip(round(W / s), -1, 1)

    That loses much on a network that was trained without it. The method is meant for training: :meth:`layer` gives a linear layer that keeps
    float weights, computes with their ternary values and with activations rounded to 8 bits by token, and passes gradients
    straight through the rounding; :meth:`swap` puts it in the place of a network's linear layers. Afterwards
    :func:`tersor.model.compress_layers` replaces each by one that computes the same with integers, from what is stored.

    Weights: float, out x in. No data is used. A matrix more than half of which is 0 has no median; the mean stands in.
    Stored: five ternary digits a byte (1.6 bits a weight), and the scale in the header. Raises :class:`tersor.ConfigError`,
    :class:`tersor.InputError` for NaN and infinity in the weights.
    """

    name = "bitnet-b158"
    domains = ("weight",)
    native = "torch"

    measure: str = field("median", one_of("mean", "median"), help="what of the weights' magnitudes is the scale")

    @classmethod
    def examples(cls) -> list[BitNet158]:
        """For the conformance kit."""
        return [cls(), cls(measure="mean")]

    @classmethod
    def at_bits(cls, bits: int) -> list[BitNet158]:
        """The default at 2 bits (1.6 as stored), none otherwise."""
        return [cls()] if bits == 2 else []

    def layer(self, in_features: int, out_features: int, bias: bool = True, norm: bool = True) -> BitLinear:
        """A linear layer that trains its ternary weights; see :class:`BitLinear`."""
        return BitLinear(in_features, out_features, bias, measure=self.measure, norm=norm)

    def swap(self, network: nn.Module, keep: Iterable[str] = (), norm: bool = True) -> nn.Module:
        """Put a :class:`BitLinear` with the same weights in the place of every ``torch.nn.Linear`` below ``network``, which is returned.

        ``keep``: names of layers that stay as they are, with wildcards (``"*head"``). ``norm``: as :class:`BitLinear`; without it the
        swapped network computes nearly the same as before, with it the layers' inputs are normalised. Raises
        :class:`tersor.ConfigError` where there is nothing to swap.
        """
        keep = [keep] if isinstance(keep, str) else list(keep)
        made: dict[nn.Linear, BitLinear] = {}  # layers that have several names stay one
        for name, layer in list(network.named_modules(remove_duplicate=False)):
            if type(layer) is not nn.Linear or not name or any(fnmatch.fnmatchcase(name, k) for k in keep):
                continue
            if layer not in made:
                like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
                new = BitLinear(layer.in_features, layer.out_features, False, measure=self.measure, norm=norm, **like)
                new.weight, new.bias = layer.weight, layer.bias
                made[layer] = new.train(layer.training)
            above, _, leaf = name.rpartition(".")
            network.get_submodule(above)._modules[leaf] = made[layer]
        if not made:
            raise ConfigError(f"bitnet-b158: the network has no torch.nn.Linear to swap (keep={keep!r})")
        return network

    def _quantize(self, x: Tensor, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        scale = scale_of(x, self.measure)
        return {"digits": pack_ternary(ternary(x, scale).to(torch.int8)), "scale": float(scale)}

    def _load(self, parts: dict[str, Any], spec: Spec) -> tuple[Tensor, float]:
        """Digits -1, 0, 1 (int8, out x in) and the scale."""
        scale = parts["scale"]
        if type(scale) is not float or not 0 <= scale <= torch.finfo(torch.float32).max:
            raise ValueError(f"scale: {scale!r}, where a finite positive number fits")
        return unpack_ternary(parts["digits"], spec.size).view(spec.shape), scale

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        digits, scale = self._load(parts, spec)
        return digits.float().mul_(scale)

    def _uniform(self, parts: dict[str, Any], spec: Spec) -> Uniform:
        digits, scale = self._load(parts, spec)
        rows, columns = spec.shape
        return Uniform((digits + 1).to(torch.uint8), torch.full((rows, 1), scale), torch.ones(rows, 1), 2, columns)

    def _module(self, parts: dict[str, Any], spec: Spec, bias: Tensor | None, layer: nn.Module) -> nn.Module | None:
        if not (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"):
            return None
        self._load(parts, spec)
        norm = isinstance(layer, BitLinear) and layer.norm
        rows, columns = spec.shape
        return TernaryLinear(rows, columns, parts["digits"], parts["scale"], bias, norm)


def scale_of(weight: Tensor, measure: str) -> Tensor:
    """The scale of a matrix: mean or median (the lower of the two in the middle) of its magnitudes; a number of float32."""
    size = weight.detach().float().abs()
    if measure == "median":
        median = size.flatten().median()
        if float(median) > 0:
            return median
    return size.mean(dtype=torch.float64).float()


def ternary(weight: Tensor, scale: Tensor) -> Tensor:
    """-1, 0, 1 as float32: the nearest to ``weight / scale``."""
    if not float(scale) > 0:
        return torch.zeros_like(weight, dtype=torch.float32)
    return (weight.detach().float() / scale).round_().clamp_(-1, 1)


class BitLinear(nn.Linear):
    """A linear layer that trains ternary weights (figure 1 of the paper).

    ``forward(x)``: x float, ... x in; the result, of the same type, is ... x out. With ``norm`` the input is first normalised to mean 0 and variance 1
    by token, without parameters of its own; a token's largest magnitude then becomes 127 and its values are rounded; the weights become
    ternary; the product is scaled back, and the bias added. Gradients pass all rounding straight through: that of x is that of a
    layer with the ternary weights, that of the weights has the rounded activations. ``weight`` stays float.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        measure: str = "median",
        norm: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **options)
        if measure not in ("mean", "median"):
            raise ConfigError(f"BitLinear: measure={measure!r}; allowed: 'mean', 'median'")
        self.measure, self.norm = measure, norm

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float()
        y = _Straight.apply(layer_norm(rows, rows.shape[-1:]) if self.norm else rows, self.weight, self.measure)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, measure={self.measure}, norm={self.norm}"


class _Straight(torch.autograd.Function):
    """x W' with both rounded; gradients as if they had not been."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, measure: str) -> Tensor:  # type: ignore[override]
        scale = scale_of(weight, measure)
        rounded = ternary(weight, scale).mul_(scale)
        codes, size = absmax(x.reshape(-1, x.shape[-1]))
        values = codes.float().mul_(size).view(x.shape)
        ctx.save_for_backward(values, rounded)
        ctx.dtype = weight.dtype
        return linear(values, rounded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        values, rounded = ctx.saved_tensors
        of_x = grad @ rounded if ctx.needs_input_grad[0] else None
        of_w = (grad.flatten(0, -2).T @ values.flatten(0, -2)).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return of_x, of_w, None


class TernaryLinear(Int8Linear):
    """What a trained :class:`BitLinear` computes, with integers: int8 activations, ternary weights, int32 sums.

    Buffers: ``digits`` (packed, five a byte), ``scale`` (one number). ``norm``: whether inputs are normalised by token first.
    """

    digits: Tensor

    def __init__(self, rows: int, columns: int, digits: Tensor, scale: float, bias: Tensor | None, norm: bool) -> None:
        super().__init__(torch.tensor([scale]), bias)
        self.rows, self.columns, self.norm = rows, columns, norm
        self.register_buffer("digits", digits)

    def matrix(self) -> Tensor:
        return unpack_ternary(self.digits, self.rows * self.columns).view(self.rows, self.columns)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float()
        return super().forward(layer_norm(rows, rows.shape[-1:]) if self.norm else rows).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in={self.columns}, out={self.rows}, {super().extra_repr()}, norm={self.norm}"


def pack_ternary(digits: Tensor) -> Tensor:
    """-1, 0, 1 (any shape, read in row-major order) as uint8, five digits a byte: digit i of a byte counts 3^i, and -1 is 0."""
    flat = (digits.reshape(-1) + 1).to(torch.uint8)
    flat = torch.cat([flat, flat.new_ones(-flat.numel() % 5)]).view(-1, 5)
    return flat[:, 0] + 3 * flat[:, 1] + 9 * flat[:, 2] + 27 * flat[:, 3] + 81 * flat[:, 4]


def unpack_ternary(packed: Tensor, count: int) -> Tensor:
    """The inverse of :func:`pack_ternary`: ``count`` digits, int8. Raises ValueError for another length, or bytes above 242."""
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (math.ceil(count / 5),):
        raise ValueError(f"digits: {packed.dtype} {tuple(packed.shape)}, where {math.ceil(count / 5)} of uint8 fit")
    if count and int(packed.max()) > 242:
        raise ValueError("digits: a byte above 242 stands for no five ternary digits")
    return _digits().to(packed.device)[packed.int()].view(-1)[:count]


@functools.cache
def _digits() -> Tensor:
    """The five digits of each byte up to 242."""
    return (torch.arange(243)[:, None] // 3 ** torch.arange(5) % 3 - 1).to(torch.int8)
