"""Dual Grained Quantization: Efficient Fine-Grained Quantization for LLM (https://arxiv.org/abs/2310.04836)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tersor import Calibration, CalibrationError, ConfigError, Quantizer, Spec, Uniform, between, field, method, one_of
from tersor_kit_weight_quant import exponent_of, gram, group_count, normalise, pack, unpack
from tersor_kit_weight_quant.int8 import LARGEST, Int8Linear

GROUP_RATIOS = tuple(1.0 - 0.03 * i for i in range(20))  # phase one: fractions of a group's range
CHANNEL_RATIOS = tuple(1.4 - 0.02 * i for i in range(36))  # phase two: fractions of a channel's largest magnitude
_FULL = 6  # of these: how many are tried with X'X as a whole
_MOST = 1024.0  # the most that a channel is divided by, so that float16 holds the scales of the weights that it multiplies
_CHUNK = 1 << 18  # weights worked on at a time


@method
class DGQ(Quantizer):
    """4-bit groups whose scales are integers on the 8-bit grid of their channel, so that the product stays one of int8 (section 3).

    Groupwise scales in floating point would cut a product of integers into pieces. In DGQ a group's scale is an integer s2 times
    the scale s1 of the whole channel (a row of W), so that 4-bit codes become int8 without loss, and one int8 product follows:

        W8 = (codes - zero) * s2  in [-127, 127],        y = s_x s1 * (x8 W8')

    The steps, all of which weigh errors by X'X of the calibration data:

    1. Percentile clipping smoothing (section 3.3). Input channels whose largest activation is above the ``percentile`` of all channels'
       are divided by how far they are above it, and the weights' columns multiplied with it. Scaled columns widen the range of the groups
       they are in; with ``smooth="auto"`` a layer is smoothed only where that lowers its expected error, that of the rounded weights
       (after phase one) and that of the rounded activations together. The paper smooths always (``"on"``).
    2. Phase one of the search (section 3.2): scale and zero point of each group, by the fraction of its range with the least output error.
    3. Phase two: the scale s1 of each channel, by the fraction of its largest magnitude with the least output error once every
       s2 is an integer, round(group scale / s1), and codes are kept where (codes - zero) * s2 fits into int8.

    The layer that ``module()`` and :func:`tersor.model.compress_layers` give rounds activations to int8 by token, or on one fixed
    grid seen in calibration (``activations="static"``); dequantizing gives the weights alone.

    Weights: float, out x in. Calibration: the layer's inputs, samples x in; X'X alone does, root mean squares then stand in for
    largest activations, but not for ``"auto"``, which does not smooth then, nor for ``"static"``.
    Stored: codes and zero points at ``bits`` bits, s2 at 7 bits, s1 in float16 with one power of two for the tensor, and the smoothed channels
    (number and float16 factor). Raises :class:`tersor.ConfigError`, :class:`tersor.InputError` for NaN and infinity in the
    weights, :class:`tersor.CalibrationError` for calibration data that is missing, of another width or not finite.
    """

    name = "dgq"
    domains = ("weight",)
    native = "torch"
    calibration = "required"
    wants = ("gram", "inputs")

    bits: int = field(4, between(2, 6), help="bits per weight")
    group_size: int = field(128, help="weights that share a scale; -1: a whole row")
    smooth: str = field(
        "auto", one_of("auto", "on", "off"), help="divide outlier channels of the activations: where it helps, always, never"
    )
    percentile: float = field(0.995, between(0.0, 1.0), help="fraction of the channels that are no outliers")
    activations: str = field(
        "token", one_of("token", "static"), help="int8 grid of activations: each token's own, or one from calibration"
    )

    def __attrs_post_init__(self) -> None:
        if self.group_size < 1 and self.group_size != -1:
            raise ConfigError(f"dgq: group_size={self.group_size} is not allowed; allowed: 1 or more, or -1 for a whole row")

    @classmethod
    def examples(cls) -> list[DGQ]:
        """For the conformance kit."""
        return [
            cls(group_size=4),
            cls(bits=3, group_size=-1, smooth="on", percentile=0.7),
            cls(activations="static", smooth="off"),
        ]

    def _size(self, columns: int) -> int:
        """Columns in a group."""
        return max(columns, 1) if self.group_size == -1 else min(self.group_size, max(columns, 1))

    def _quantize(self, x: Tensor, calibration: Calibration, spec: Spec) -> dict[str, Any]:
        n = x.shape[1]
        size = self._size(n)
        hessian = gram(calibration, n)
        hessian = hessian / hessian.diagonal().mean().clamp(min=1e-30)
        exponent = exponent_of(x)
        weight = normalise(x, exponent)
        factor, weight, hessian, group, zero = self._smoothed(weight, hessian, calibration, size)
        channel = phase_two(weight, hessian, blocks_of(hessian, size), group, zero, self.bits, size)
        q, multiple = on_channel(folded(weight, size), group, zero, channel.float(), self.bits)
        parts: dict[str, Any] = {
            "codes": pack(unfolded(q.add_(zero), n).to(torch.uint8), self.bits),
            "zero": pack(zero[..., 0].T.to(torch.uint8), self.bits),
            "multiple": pack(multiple[..., 0].T.to(torch.uint8), 7),
            "scale": channel[:, 0],
        }
        if exponent:
            parts["exponent"] = exponent
        if factor is not None:
            channels = (factor != 1).nonzero()[:, 0]
            parts |= {"outliers": channels.int(), "factors": factor[channels].half()}
        if self.activations == "static":
            parts["activation"] = self._static(calibration, factor)
        return parts

    def _smoothed(
        self, weight: Tensor, hessian: Tensor, calibration: Calibration, size: int
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
        """What input channels are divided by (float32 of float16's numbers, or None), W and X'X after that, and phase one's result."""
        inputs, factor = calibration.inputs, self._factor(hessian, calibration.inputs)
        choices = [(None, weight, hessian)]
        if factor is not None:
            choices.append((factor, weight * factor, hessian / factor / factor[:, None]))
            choices = choices[1:] if self.smooth == "on" else choices
        found = []
        for f, w, h in choices:
            group, zero = phase_one(w, blocks_of(h, size), self.bits, size)
            expected = 0.0
            if len(choices) > 1:
                q = nearest(folded(w, size), group, -zero, 2**self.bits - 1 - zero).mul_(group)
                expected = _expected(w, w - unfolded(q, w.shape[1]), inputs if f is None else inputs / f)
            found.append((expected, f, w, h, group, zero))
        return min(found, key=lambda t: t[0])[1:]

    def _factor(self, hessian: Tensor, inputs: Tensor | None) -> Tensor | None:
        """How far the largest activation of a channel is above the percentile of all channels'; None where smoothing is out of question."""
        if self.smooth == "off" or (inputs is None and self.smooth == "auto"):
            return None
        largest = hessian.diagonal().clamp(min=0).sqrt() if inputs is None else inputs.abs().amax(0)
        usual = largest.sort().values[min(int(self.percentile * len(largest)), len(largest) - 1)]
        if not float(usual) > 0:
            return None
        factor = (largest / usual).clamp_(1.0, _MOST).half().float()
        return factor if bool((factor != 1).any()) else None

    def _static(self, calibration: Calibration, factor: Tensor | None) -> float:
        if calibration.inputs is None:
            raise CalibrationError(
                "dgq: activations=static needs calibration.inputs, samples x in; X'X does not tell their range"
            )
        inputs = calibration.inputs if factor is None else calibration.inputs / factor
        return max(float(inputs.abs().max()) / LARGEST, 1e-30)

    def _load(self, parts: dict[str, Any], spec: Spec) -> tuple[Tensor, Tensor, Tensor | None]:
        """W8 (int8, out x in), s1 (float32, out) and what channels of the input are divided by (float32, in, or None)."""
        rows, n = spec.shape
        size = self._size(n)
        matrix = integers(parts["codes"], parts["zero"], parts["multiple"], (rows, n), self.bits, size)
        scale, exponent = parts["scale"], parts.get("exponent", 0)
        if scale.dtype != torch.float16 or tuple(scale.shape) != (rows,) or not bool((scale.isfinite() & (scale >= 0)).all()):
            raise ValueError(f"scale: not {rows} finite positive numbers of float16")
        if type(exponent) is not int or abs(exponent) > 120:
            raise ValueError(f"exponent: {exponent!r}, where an integer from -120 to 120 fits")
        factor = None
        if "outliers" in parts:
            channels, factors = parts["outliers"].long(), parts["factors"].float()
            if channels.numel() and not 0 <= int(channels.min()) <= int(channels.max()) < n:
                raise ValueError(f"outliers: not numbers below {n}")
            if channels.shape != factors.shape or not bool(factors.isfinite().all()):
                raise ValueError("factors: not one finite number for each outlier")
            factor = torch.ones(n, device=scale.device).index_copy(0, channels, factors.clamp(min=1.0))
        return matrix, scale.float() * math.ldexp(1.0, exponent), factor

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        matrix, scale, factor = self._load(parts, spec)
        value = matrix.float().mul_(scale[:, None])
        limit = min(torch.finfo(getattr(torch, spec.dtype)).max, torch.finfo(torch.float32).max)
        return (value if factor is None else value.div_(factor)).clamp_(-limit, limit)

    def _uniform(self, parts: dict[str, Any], spec: Spec) -> Uniform | None:
        """None where channels are smoothed: the columns of a group then have scales of their own."""
        _, scale, factor = self._load(parts, spec)
        if factor is not None:
            return None
        rows, n = spec.shape
        groups = group_count(n, self.group_size)
        codes = unpack(parts["codes"], self.bits, rows * n).view(rows, n)
        multiple = unpack(parts["multiple"], 7, rows * groups).view(rows, groups)
        zero = unpack(parts["zero"], self.bits, rows * groups).view(rows, groups).float()
        return Uniform(codes, multiple * scale[:, None], zero, self.bits, self._size(n))

    def _module(self, parts: dict[str, Any], spec: Spec, bias: Tensor | None, layer: nn.Module) -> nn.Module | None:
        if not (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"):
            return None
        _, scale, factor = self._load(parts, spec)
        size = self._size(spec.shape[1])
        static = parts.get("activation")
        if (self.activations == "static") != (type(static) is float and 0 < static < math.inf):
            raise ValueError(f"activation: {static!r}, where the scale of static activations is a positive number")
        return DGQLinear(parts, spec.shape, self.bits, size, scale, bias, factor, static)


# -- the grids. Matrices are folded into groups, groups x rows x size, the last group filled up with zeros; what belongs to groups is
# groups x rows x 1.


def folded(weight: Tensor, size: int) -> Tensor:
    """rows x in as groups x rows x size."""
    return pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size)).transpose(0, 1).contiguous()


def unfolded(weight: Tensor, columns: int) -> Tensor:
    """The opposite."""
    return weight.transpose(0, 1).flatten(1)[:, :columns]


def blocks_of(hessian: Tensor, size: int) -> Tensor:
    """The part of X'X that belongs to each group: groups x size x size."""
    n = hessian.shape[0]
    padded = pad(hessian, (0, -n % size, 0, -n % size)).unflatten(0, (-1, size)).unflatten(2, (-1, size))
    return padded.diagonal(dim1=0, dim2=2).movedim(2, 0).contiguous()


def inverse_of(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, 0.0)


def nearest(weight: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The nearest whole multiple of ``scale`` between ``low`` and ``high``, as that number."""
    q = (weight * inverse_of(scale)).round_()
    return torch.minimum(torch.maximum(q, low, out=q), high, out=q)


def phase_one(weight: Tensor, blocks: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group by the least error |X_g (W_g - Q_g)'|^2 of the group alone; float32, groups x rows x 1.

    ``weight``: rows x in, float32. ``blocks``: from :func:`blocks_of`.
    """
    steps = 2**bits - 1
    found = torch.zeros(2, blocks.shape[0], weight.shape[0], 1, device=weight.device)
    for rows in _chunks(weight):
        w = folded(weight[rows], size)
        low, high = w.amin(2, keepdim=True).clamp_(max=0.0), w.amax(2, keepdim=True).clamp_(min=0.0)
        least = torch.full_like(low, math.inf)
        for ratio in GROUP_RATIOS:
            scale = (high - low) * (ratio / steps)
            zero = (-low * ratio * inverse_of(scale)).round_().clamp_(0, steps)
            q = nearest(w, scale, -zero, steps - zero)
            lost = torch.addcmul(-w, q, scale, out=q)
            error = torch.bmm(lost, blocks).mul_(lost).sum(2, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            found[:, :, rows] = torch.where(better, torch.stack([scale, zero]), found[:, :, rows])
    return found[0], found[1]


def whole_multiples(group: Tensor, zero: Tensor, channel: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """s2 of each group, 1 to 127, and the least and the greatest code - zero with |(code - zero) * s2| <= 127."""
    multiple = (group * inverse_of(channel)).round_().clamp_(1, LARGEST)
    reach = (LARGEST / multiple).floor_()
    return multiple, torch.maximum(-zero, -reach), torch.minimum(2**bits - 1 - zero, reach)


def on_channel(w: Tensor, group: Tensor, zero: Tensor, channel: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Code - zero of folded weights, and s2, on the grids whose scales are whole multiples of ``channel`` (float32, rows x 1)."""
    multiple, low, high = whole_multiples(group, zero, channel, bits)
    return nearest(w, multiple * channel, low, high), multiple


def phase_two(weight: Tensor, hessian: Tensor, blocks: Tensor, group: Tensor, zero: Tensor, bits: int, size: int) -> Tensor:
    """s1 of each channel by the least error |X (W - Q)'|^2 of the whole channel; float16, rows x 1.

    All fractions are tried with the errors of the groups added up, which is quick, and the best few of each channel with X'X as a whole.
    """
    found = torch.zeros(weight.shape[0], 1, dtype=torch.float16, device=weight.device)
    ratios = torch.tensor(CHANNEL_RATIOS, device=weight.device) / LARGEST
    for rows in _chunks(weight):
        w, g, z = folded(weight[rows], size), group[:, rows], zero[:, rows]
        largest = weight[rows].abs().amax(1, keepdim=True)

        def lost(channel: Tensor, w: Tensor = w, g: Tensor = g, z: Tensor = z) -> Tensor:
            q, multiple = on_channel(w, g, z, channel, bits)
            return torch.addcmul(-w, q, multiple * channel, out=q)

        errors = []
        for ratio in ratios:
            d = lost((largest * ratio).half().float())
            errors.append(torch.bmm(d, blocks).mul_(d).sum((0, 2)))
        best = torch.stack(errors, 1).topk(_FULL, largest=False).indices
        least = torch.full_like(largest, math.inf)
        for k in range(_FULL):
            channel = (largest * ratios[best[:, k : k + 1]]).half()
            d = unfolded(lost(channel.float()), weight.shape[1])
            error = (d @ hessian).mul_(d).sum(1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            found[rows] = torch.where(better, channel, found[rows])
    return found


def integers(codes: Tensor, zero: Tensor, multiple: Tensor, shape: tuple[int, ...], bits: int, size: int) -> Tensor:
    """W8 = (codes - zero) * s2, int8 rows x in, out of the packed parts. Raises ValueError where it does not fit into int8."""
    rows, n = shape
    groups = group_count(n, size)
    z = unpack(zero, bits, rows * groups).view(rows, groups).to(torch.int16)
    s = unpack(multiple, 7, rows * groups).view(rows, groups).to(torch.int16)
    w = unpack(codes, bits, rows * n).view(rows, n).to(torch.int16)
    index = torch.arange(n, device=w.device) // size
    w.sub_(z[:, index]).mul_(s[:, index])
    if w.numel() and int(w.abs().max()) > LARGEST:
        raise ValueError("codes: (code - zero) * multiple is above 127")
    return w.to(torch.int8)


def _expected(weight: Tensor, lost: Tensor, inputs: Tensor) -> float:
    """Expected squared error of the output: that of the weights' rounding, and that of tokens rounded to int8.

    A token's rounding errors are taken as independent, of variance step^2 / 12.
    """
    step = inputs.abs().amax(1) / LARGEST
    return float((inputs @ lost.T).square_().sum() + step.square().sum() / 12 * weight.square().sum())


def _chunks(x: Tensor) -> list[slice]:
    step = max(1, _CHUNK // max(1, x.shape[1]))
    return [slice(i, min(i + step, x.shape[0])) for i in range(0, x.shape[0], step)]


class DGQLinear(Int8Linear):
    """A linear layer that computes as DGQ: its only matrix product is int8 x int8, with sums in int32.

    Buffers: ``codes``, ``zero``, ``multiple`` (packed as in the file), ``scale`` (s1), and where channels are smoothed ``inverse``, what the
    input is multiplied with. ``static``: the scale of all activations, or None for one by token.
    """

    codes: Tensor
    zero: Tensor
    multiple: Tensor
    inverse: Tensor | None

    def __init__(
        self, parts: dict[str, Any], shape: tuple[int, ...], bits: int, size: int, scale: Tensor, bias: Tensor | None,
        factor: Tensor | None, static: float | None,
    ) -> None:  # fmt: skip
        super().__init__(scale, bias)
        self.shape, self.bits, self.size, self.static = shape, bits, size, static
        for name in ("codes", "zero", "multiple"):
            self.register_buffer(name, parts[name])
        self.register_buffer("inverse", None if factor is None else 1 / factor)

    def matrix(self) -> Tensor:
        return integers(self.codes, self.zero, self.multiple, self.shape, self.bits, self.size)

    def dense(self) -> Tensor:
        value = super().dense()
        return value if self.inverse is None else value * self.inverse

    def compute(self, x: Tensor) -> Tensor:
        if self.inverse is not None:
            x = x * self.inverse
        if self.static is None:
            return super().compute(x)
        codes = (x / self.static).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
        return self.integers()(codes).mul_(self.scale * self.static)

    def extra_repr(self) -> str:
        return f"in={self.shape[1]}, out={self.shape[0]}, {super().extra_repr()}, bits={self.bits}, group_size={self.size}"
