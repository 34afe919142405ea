"""NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search (https://arxiv.org/abs/2308.05600).

The search without data is that of PowerQuant (https://arxiv.org/abs/2301.09858), by the same authors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from decimal import Context, Decimal
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tersor import Calibration, CalibrationError, ConfigError, Quantizer, Spec, at_least, between, field, method
from tersor_kit_weight_quant import CLIP_RATIOS, exponent_of, gram, group_count, normalise, pack, unpack

#: Exponents are stored in thousandths; what a search may give.
LEAST, MOST = 200, 2000
_SAMPLE = 1 << 16  # weights that the search for one number looks at
_DECIMAL = Context(prec=25)


@functools.lru_cache(1024)
def level_table(bits: int, power: int) -> Tensor:
    """The 2^bits levels of a group with scale 1: sign(c) |c / 2^(bits-1)|^(1/a) for c = -2^(bits-1) ... 2^(bits-1) - 1.

    ``power``: the exponent a in thousandths. Float32, ascending, from -1 on; not to be written. Computed in decimal arithmetic, so
    that they are the same on every machine.
    """
    size = [float(_DECIMAL.exp(_DECIMAL.divide(log, power))) for log in _logarithms(2 ** (bits - 1))]
    return torch.tensor([-s for s in reversed(size)] + [0.0] + size[:-1])


@functools.cache
def _logarithms(half: int) -> list[Decimal]:
    """1000 ln(c / half) for c = 1 ... half."""
    one = _DECIMAL.ln(Decimal(half))
    return [_DECIMAL.multiply(_DECIMAL.subtract(_DECIMAL.ln(Decimal(c)), one), Decimal(1000)) for c in range(1, half + 1)]


@method
class NUPES(Quantizer):
    """Codes are spaced evenly on the scale of |w|^a: fine steps near 0, where most weights are, coarse ones where few are.

    Quantizers that turn products of weights into products of codes are the automorphisms of the positive numbers under
    multiplication, and the continuous ones of these are the powers. A group of weights with scale s has the levels

        s sign(c) |c / 2^(bits-1)|^(1/a),      c = -2^(bits-1) ... 2^(bits-1) - 1,

    one exponent a for the matrix. a = 1 is uniform. s is minus the extreme weight of the group, which takes the one level that has
    no opposite, so that none is left over.

    Without data (``steps=0``, or no calibration) each weight goes to its nearest level, and a is what leaves the least squared
    error. PowerQuant shows this error to be locally convex in a, with a single minimum; a golden section search finds it. With
    ``clip`` scales are searched too, by group, in turns with a.

    With data, a and the codes are learned so that the layer's output changes least, |X W' - X Q'|^2. Codes are not only
    rounded up or down: each weight has a position among all levels, and moves through them by gradient descent (Adam).
    Between two levels its value goes over softly, by a sigmoid that hardens to a step. The derivative by log a of a level v is
    -v log |v|, which is 0 at 0 and bounded, and needs no power of a small number.
    At the end positions are rounded; ``sweeps`` then go through the columns, and give every weight the level, of all, that is
    best with all other weights as they are.

    Weights: float, out x in. Calibration: the layer's inputs, samples x in, or their X'X, in x in.
    Stored: codes at ``bits`` bits, signed scales in float16, the exponent in thousandths.

    Raises :class:`tersor.ConfigError` for a group size of 0 or below -1, :class:`tersor.InputError` for NaN and infinity in the
    weights, :class:`tersor.CalibrationError` for calibration data of another width, all zero or not finite.
    """

    name = "nupes"
    domains = ("weight",)
    native = "torch"
    calibration = "optional"

    bits: int = field(4, between(2, 8), help="bits per weight")
    group_size: int = field(128, help="weights that share a scale; -1: a whole row")
    clip: bool = field(False, help="search the scale of each group for the least squared error")
    steps: int = field(16, at_least(0), help="steps of learning, given calibration data; 0: none, and such data is not used")
    rate: float = field(0.1, between(0, 1), help="how far a code may move in the first step of learning; falls to 0")
    sweeps: int = field(3, at_least(0), help="passes over the columns after learning")
    damp: float = field(0.01, between(0, 1), help="damping, as a fraction of the Hessian's mean diagonal")

    def __attrs_post_init__(self) -> None:
        if self.group_size < 1 and self.group_size != -1:
            raise ConfigError(f"nupes: group_size={self.group_size} is not allowed; allowed: 1 or more, or -1 for a whole row")

    @classmethod
    def examples(cls) -> list[NUPES]:
        """For the conformance kit."""
        return [cls(group_size=4, steps=4), cls(bits=3, group_size=-1, clip=True, steps=0)]

    def _quantize(self, x: Tensor, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        exponent = exponent_of(x)
        w = normalise(x, exponent)
        scale, power = self._search(w)
        codes = _nearest(_ratio(w, self._wide(scale, w)), self._levels(power, w))
        if calibration is not None and self.steps:
            hessian = self._hessian(calibration, w.shape[1])
            codes, power = self._learn(w, self._wide(scale, w), power, codes, hessian)
        parts: dict[str, Any] = {"codes": pack(codes.to(torch.uint8), self.bits), "scale": scale, "power": power}
        return {**parts, "exponent": exponent} if exponent else parts

    def _size(self, columns: int) -> int:
        return max(columns, 1) if self.group_size == -1 else self.group_size

    def _wide(self, scale: Tensor, w: Tensor) -> Tensor:
        """The scale of every weight: float32, out x in."""
        return scale.float().repeat_interleave(self._size(w.shape[1]), 1)[:, : w.shape[1]]

    def _levels(self, power: int, like: Tensor) -> Tensor:
        return level_table(self.bits, power).to(like.device)

    # -- without data

    def _search(self, w: Tensor) -> tuple[Tensor, int]:
        """Scales (float16, out x groups) and the exponent, in thousandths, of the least squared error."""
        rows = w[:: -(-w.numel() // _SAMPLE)]
        groups = _groups(w, self._size(w.shape[1]))
        extreme = -groups.gather(2, groups.abs().argmax(2, keepdim=True))[..., 0]
        scale, power = extreme.half(), 0
        for _ in range(3 if self.clip else 1):
            if power:
                scale = self._clip(w, extreme, power)
            wide = self._wide(scale[:: -(-w.numel() // _SAMPLE)], rows)
            ratio = _ratio(rows, wide)

            def error(power: int, ratio: Tensor = ratio, wide: Tensor = wide) -> float:
                levels = self._levels(power, rows)
                return float((_values(_nearest(ratio, levels), levels) - ratio).mul_(wide).square_().sum())

            power = _golden(error, LEAST, MOST)
        return scale, power

    def _clip(self, w: Tensor, extreme: Tensor, power: int) -> Tensor:
        """For each group the scale that leaves the least squared error at this exponent, of the fractions that the kit tries."""
        levels = self._levels(power, w)

        def error(scale: Tensor) -> Tensor:
            wide = self._wide(scale, w)
            value = _values(_nearest(_ratio(w, wide), levels), levels).mul_(wide)
            return _groups(value.sub_(w).square_(), self._size(w.shape[1])).sum(2)

        best = extreme.half()
        least = error(best)
        for fraction in CLIP_RATIOS[1:]:
            scale = (extreme * fraction).half()
            new = error(scale)
            best, least = torch.where(new < least, scale, best), torch.minimum(new, least)
        return best

    # -- with data

    def _hessian(self, calibration: Calibration, columns: int) -> Tensor:
        """X'X over its mean diagonal, damped; float32, in x in."""
        hessian = gram(calibration, columns)
        mean = float(hessian.diagonal().mean())
        if not mean > 0:
            raise CalibrationError("nupes: all calibration inputs are zero; allowed: inputs that are like those in use")
        hessian = hessian / mean
        hessian.diagonal().add_(max(self.damp, 1e-6))  # a column never active still has a best level
        return hessian

    def _learn(self, w: Tensor, wide: Tensor, power: int, codes: Tensor, hessian: Tensor) -> tuple[Tensor, int]:
        """Codes and exponent that are learned from where the search without data ended; the former ones where those are better."""
        start = self._loss(w, wide, codes, power, hessian)
        position, learned = self._descend(w, wide, power, hessian)
        found = position.round_().clamp_(0, 2**self.bits - 1).to(codes.dtype)
        if not self._loss(w, wide, found, learned, hessian) < start:
            found, learned = codes, power
        for _ in range(self.sweeps):
            found = self._sweep(w, wide, found, learned, hessian)
        return found, learned

    def _loss(self, w: Tensor, wide: Tensor, codes: Tensor, power: int, hessian: Tensor) -> float:
        error = _values(codes, self._levels(power, w)).mul_(wide).sub_(w)
        return float((error @ hessian).mul_(error).sum())

    def _descend(self, w: Tensor, wide: Tensor, power: int, hessian: Tensor) -> tuple[Tensor, int]:
        """Soft positions among the levels (float32, out x in) after ``steps`` steps of Adam, and the exponent, in thousandths."""
        last = 2**self.bits - 1
        levels = self._levels(power, w)
        ratio = _ratio(w, wide)
        below = _below(ratio, levels)
        position = below + (ratio - _values(below, levels)) / _values(below, levels.diff())
        position.clamp_(-0.49, last + 0.49)
        log_a, moment, second = math.log(power / 1000), torch.zeros_like(w), torch.zeros_like(w)
        moment_a = second_a = 0.0
        for step in range(self.steps):
            left = 1 - step / self.steps
            steep = SOFT * (HARD / SOFT) ** (1 - left)
            below = position.floor().clamp_(0, last - 1)
            soft, slope = _transition(position - below, steep)
            below = below.to(torch.int32)
            gap = _values(below, levels.diff())
            error = torch.addcmul(_values(below, levels), gap, soft).mul_(wide).sub_(w)
            gradient = (error @ hessian).mul_(wide)
            by_log_a = -torch.xlogy(levels, levels.abs())
            moved = torch.addcmul(_values(below, by_log_a), _values(below, by_log_a.diff()), soft)
            slope_a = float(moved.mul_(gradient).sum()) / w.numel()
            gradient.mul_(gap).mul_(slope)
            moment.lerp_(gradient, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            grown = [1 - b ** (step + 1) for b in BETAS]
            size = (second / grown[1]).sqrt_().add_(1e-12)
            position.addcdiv_(moment, size, value=-self.rate * left / grown[0]).clamp_(-0.49, last + 0.49)
            moment_a += (1 - BETAS[0]) * (slope_a - moment_a)
            second_a += (1 - BETAS[1]) * (slope_a**2 - second_a)
            log_a -= RATE_A * left * (moment_a / grown[0]) / (math.sqrt(second_a / grown[1]) + 1e-30)
            power = min(max(round(1000 * math.exp(log_a)), LEAST), MOST)
            levels = self._levels(power, w)
        return position, power

    def _sweep(self, w: Tensor, wide: Tensor, codes: Tensor, power: int, hessian: Tensor) -> Tensor:
        """Column after column, the best level of every weight with all others as they are; the loss cannot grow."""
        levels = self._levels(power, w)
        middles = (levels[1:] + levels[:-1]) / 2
        scale, codes = wide.T.contiguous(), codes.T.contiguous()
        value = _values(codes, levels).mul_(scale)
        inverse = torch.where(scale != 0, 1 / scale, 0.0)
        pull = hessian @ (value - w.T)  # half the gradient by every weight
        diagonal = hessian.diagonal().tolist()
        for start in range(0, len(value), BLOCK):
            block = range(start, min(start + BLOCK, len(value)))
            change = torch.zeros(len(block), value.shape[1], device=w.device)
            for i, k in enumerate(block):
                here = torch.addmv(pull[k], change[:i].T, hessian[start:k, k])
                best = torch.add(value[k], here, alpha=-1 / diagonal[k]).mul_(inverse[k])
                codes[k] = torch.bucketize(best, middles, out_int32=True)
                torch.sub(_values(codes[k], levels).mul_(scale[k]), value[k], out=change[i])
            value[block.start : block.stop] += change
            pull.addmm_(hessian[:, block.start : block.stop], change)
        return codes.T.contiguous()

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        rows, columns = spec.shape
        scale, power, exponent = parts["scale"], parts["power"], parts.get("exponent", 0)
        shape = (rows, group_count(columns, self.group_size))
        if scale.dtype != torch.float16 or tuple(scale.shape) != shape or not bool(torch.isfinite(scale).all()):
            raise ValueError(f"scale: {scale.dtype} {tuple(scale.shape)}, where finite float16 {shape} fits")
        if type(power) is not int or not LEAST <= power <= MOST or type(exponent) is not int or abs(exponent) > 120:
            raise ValueError(f"power {power!r} and exponent {exponent!r}, where {LEAST} to {MOST} and -120 to 120 fit")
        codes = unpack(parts["codes"], self.bits, rows * columns).view(rows, columns)
        value = _values(codes.to(torch.int32), self._levels(power, codes))
        value.mul_(self._wide(scale, value)).mul_(math.ldexp(1.0, exponent))
        limit = min(torch.finfo(getattr(torch, spec.dtype)).max, torch.finfo(torch.float32).max)
        return value.clamp_(-limit, limit)


SOFT, HARD = 6.0, 60.0  # how steep the transition between two levels is in the first and the last step
BETAS = (0.9, 0.95)
RATE_A = 0.01  # how far log a may move in the first step
BLOCK = 32


def _groups(x: Tensor, size: int) -> Tensor:
    """Rows x groups x size; a last shorter group is filled with zeros."""
    return pad(x, (0, -x.shape[1] % size)).unflatten(1, (-1, size))


def _ratio(w: Tensor, wide: Tensor) -> Tensor:
    """Weights in units of their scale; 0 where that is 0."""
    return torch.where(wide != 0, w / wide, 0.0)


def _values(index: Tensor, table: Tensor) -> Tensor:
    """Entries of a table, in the shape of ``index`` (int32)."""
    return table.index_select(0, index.reshape(-1)).view(index.shape)


def _below(x: Tensor, table: Tensor) -> Tensor:
    """How many entries of an ascending table but its first and last are at most x, int32: the interval that x is in."""
    return torch.bucketize(x, table[1:-1], out_int32=True, right=True)


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The index of the nearest of ascending levels, int32."""
    middles = (levels[1:] + levels[:-1]) / 2
    if len(middles) > 15:
        return torch.bucketize(x, middles, out_int32=True)
    count = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for middle in middles.tolist():
        count += x > middle
    return count.to(torch.int32)


def _transition(x: Tensor, steep: float) -> tuple[Tensor, Tensor]:
    """From 0 at x = 0 to 1 at x = 1 by a sigmoid, and its slope."""
    low = 1 / (1 + math.exp(steep / 2))
    soft = torch.sigmoid((x - 0.5).mul_(steep))
    slope = (soft - soft.square()).mul_(steep / (1 - 2 * low))
    return soft.sub_(low).mul_(1 / (1 - 2 * low)), slope


def _golden(error: Callable[[int], float], low: int, high: int) -> int:
    """The integer where a function with a single minimum has it, by golden section."""
    error = functools.cache(error)
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 3:
        left, right = round(high - ratio * (high - low)), round(low + ratio * (high - low))
        if error(left) <= error(right):
            high = right
        else:
            low = left
    return min(range(low, high + 1), key=error)
