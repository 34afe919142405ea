"""decoupleQ: Towards 2-bit Post-Training Uniform Quantization via decoupling Parameters into Integer and Floating Points
(https://arxiv.org/abs/2404.12759)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tersor import Calibration, ConfigError, Quantizer, Spec, Uniform, at_least, between, field, method
from tersor_kit_weight_quant import (
    CLIP_RATIOS,
    damped,
    descend,
    exponent_of,
    feedback,
    fit_grid,
    gram,
    group_count,
    normalise,
    pack,
    quadratic,
    unit_factor,
    unpack,
)

_RIDGE = 1e-6  # keeps a group whose codes are all equal solvable: it leaves the present scale
_SYSTEM = 1 << 22  # elements of the linear systems that are solved at a time
_FAR = 120  # the farthest exponent


@method
class DecoupleQ(Quantizer):
    """W is s * Q + z: integers Q and floats s and z of each group are optimised in turns, no longer tied to a range (section 3).

    Weights: float, out x in; a group is ``group_size`` consecutive inputs of one output. Calibration: the layer's inputs, samples x
    in, or their X'X. What is minimised is the layer's error |X W' - X (s Q + z)'|^2, with damping. After a range search for the first
    s and z, ``iterations`` times:

    - given Q: s and z of all groups of a row together are the solution of a linear least squares problem, in closed form (the paper's
      float part). They are rounded to float16, as they are stored.
    - given s and z: a quadratic program over integers in a box. It is solved by the paper's second-level approximation: columns
      are rounded in order of their activation, and the rest of the row moves to its unconstrained optimum, as in GPTQ. Then
      ``descent`` sweeps of coordinate descent over the integers repair what the ignored box costs (at 2 bits much).

    Each step's result is kept for those rows whose error it lowers, so that the error never rises. The paper's second stage, which
    trains s, z and the norms of a block by backpropagation, is not part of this: norms are not the weight's.

    Stored: codes at ``bits`` bits, s and z in float16, one power of two for the tensor: 2 bits in groups of 128 cost 2.25 bits.

    Raises :class:`tersor.ConfigError` for a group size of 0 or below -1, :class:`tersor.InputError` for NaN and infinity in the
    weights, :class:`tersor.CalibrationError` for calibration data that is missing, of another width, all zero, not finite, or not
    positive definite at the highest damping.
    """

    name = "decoupleq"
    domains = ("weight",)
    native = "torch"
    calibration = "required"

    bits: int = field(2, between(2, 8), help="bits per weight")
    group_size: int = field(128, help="weights that share a scale and a zero; -1: a whole row")
    iterations: int = field(4, at_least(1), help="times that floats and integers are optimised in turn")
    descent: int = field(1, at_least(0), help="sweeps of coordinate descent over the integers after each rounding pass")
    clip: bool = field(True, help="search the first range of each group for the least squared error")
    damp: float = field(0.01, between(0, 1), help="damping, as a fraction of the Hessian's mean diagonal")

    def __attrs_post_init__(self) -> None:
        if self.group_size < 1 and self.group_size != -1:
            raise ConfigError(
                f"decoupleq: group_size={self.group_size} is not allowed; allowed: 1 or more, or -1 for a whole row"
            )

    @classmethod
    def examples(cls) -> list[DecoupleQ]:
        """For the conformance kit."""
        return [cls(group_size=5), cls(bits=3, group_size=-1, iterations=2, descent=0, clip=False)]

    def _quantize(self, x: Tensor, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        rows, n = x.shape
        size = n if self.group_size == -1 else self.group_size
        hessian = damped(gram(calibration, n), 0.0)
        order = hessian.diagonal().argsort(descending=True, stable=True)
        factor = unit_factor(hessian, order, self.damp)
        # everything below is in x out, columns in the order of rounding
        hessian = damped(hessian, self.damp)[order][:, order].contiguous()
        exponent = exponent_of(x)
        weight = normalise(x, exponent).T[order].contiguous()
        place = order // size  # the group of each column
        at = place.tolist()
        half = 2 ** (self.bits - 1)  # integers reach from -half to half - 1

        def spread(s: Tensor, z: Tensor, q: Tensor) -> Tensor:
            """W - (s * Q + z). s, z: groups x out; q: in x out."""
            return (weight - z[place]).addcmul_(q, s[place], value=-1)

        def round_all(s: Tensor, z: Tensor) -> Tensor:
            """Q given s and z."""
            q = torch.empty_like(weight)
            inverse = torch.where(s != 0, 1 / s, 0.0)

            def round_(k: int, w: Tensor, lost: Tensor) -> None:
                g = at[k]
                torch.clamp(w.sub_(z[g]).mul_(inverse[g]).round_(), -half, half - 1, out=q[k])
                lost.sub_(z[g]).addcmul_(q[k], s[g], value=-1)

            error = feedback(weight.clone(), factor, n, lambda start, group: None, round_)
            for _ in range(self.descent):
                descend(weight, error, hessian, round_)
            return q

        grid = fit_grid(x, self.bits, size, False, CLIP_RATIOS if self.clip else ())  # (code - zero) * scale
        s = grid.scale.float().T.contiguous()
        z = ((half - grid.zero.float().T) * s).half().float()  # type: ignore[union-attr]
        q = round_all(s, z)
        least = quadratic(spread(s, z, q), hessian)
        for _ in range(self.iterations):
            new_s, new_z = self._floats(s, z, q, spread(s, z, q), hessian, place)
            found = quadratic(spread(new_s, new_z, q), hessian)
            better = found < least
            s, z, least = torch.where(better, new_s, s), torch.where(better, new_z, z), torch.where(better, found, least)
            new_q = round_all(s, z)
            found = quadratic(spread(s, z, new_q), hessian)
            better = found < least
            q, least = torch.where(better, new_q, q), torch.where(better, found, least)

        codes = torch.empty(n, rows, dtype=torch.uint8, device=x.device)
        codes[order] = (q + half).to(torch.uint8)
        parts = {
            "codes": pack(codes.T.contiguous(), self.bits),
            "scale": s.T.half().contiguous(),
            "zero": z.T.half().contiguous(),
        }
        return parts | ({"exponent": exponent} if exponent else {})

    def _floats(self, s: Tensor, z: Tensor, q: Tensor, error: Tensor, hessian: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """The s and z (groups x out, in float16's values) of least error given Q: for each row 2 x groups equations."""
        groups, rows = s.shape
        step = max(1, _SYSTEM // (2 * groups) ** 2)
        if rows > step:
            some = zip(*(t.split(step, 1) for t in (s, z, q, error)), strict=True)
            new_s, new_z = zip(*(self._floats(*part, hessian, place) for part in some), strict=True)
            return torch.cat(new_s, 1), torch.cat(new_z, 1)
        member = torch.nn.functional.one_hot(place, groups).T.to(q.dtype)  # groups x in
        # codes less their mean in the group, so that scale and offset are independent and a constant group has no slope
        mean = (member @ q).div_(member.sum(1, keepdim=True))
        centred = q - mean[place]
        edges = hessian @ member.T  # in x groups
        gradient = hessian @ error
        target = torch.cat([member @ (gradient * centred), member @ gradient])  # 2 groups x out
        between = torch.empty(rows, 2 * groups, 2 * groups, dtype=torch.float64, device=q.device)
        between[:, groups:, groups:] = member @ edges
        for g in range(groups):
            mine = (place == g).nonzero()[:, 0]
            seen = (hessian[:, mine] @ centred[mine]).mul_(centred)  # in x out
            between[:, g, :groups] = (member @ seen).T
            between[:, g, groups:] = centred[mine].T @ edges[mine]
        between[:, groups:, :groups] = between[:, :groups, groups:].transpose(1, 2)
        diagonal = between.diagonal(dim1=1, dim2=2)
        diagonal += _RIDGE * (diagonal + diagonal.mean(1, keepdim=True))
        found = torch.linalg.solve_ex(between, target.T.double())[0].float().T
        found = torch.where(torch.isfinite(found), found, 0.0)
        z = z + found[groups:] - found[:groups] * mean
        s = s + found[:groups]
        return s.clamp(-65504, 65504).half().float(), z.clamp(-65504, 65504).half().float()

    def _load(self, parts: dict[str, Any], spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (uint8, out x in), s and z (float32, out x groups)."""
        rows, n = spec.shape
        shape = (rows, group_count(n, self.group_size))
        codes = unpack(parts["codes"], self.bits, rows * n).view(rows, n)
        exponent = parts.get("exponent", 0)
        if type(exponent) is not int or abs(exponent) > _FAR:
            raise ValueError(f"exponent: {exponent!r}, where an integer from -{_FAR} to {_FAR} fits")
        for name in ("scale", "zero"):
            part = parts[name]
            if part.dtype != torch.float16 or tuple(part.shape) != shape or not bool(torch.isfinite(part).all()):
                raise ValueError(f"{name}: {part.dtype} {tuple(part.shape)}, where finite float16 {shape} fits")
        power = math.ldexp(1.0, exponent)
        return codes, parts["scale"].float() * power, parts["zero"].float() * power

    def _uniform(self, parts: dict[str, Any], spec: Spec) -> Uniform | None:
        codes, s, z = self._load(parts, spec)
        if not bool(((s != 0) | (z == 0)).all()):
            return None  # a constant group off zero has no level at which its value is 0
        zero = 2 ** (self.bits - 1) - torch.where(s != 0, z / s, 0.0)
        size = max(codes.shape[1], 1) if self.group_size == -1 else self.group_size
        return Uniform(codes, s, zero, self.bits, size)

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        codes, s, z = self._load(parts, spec)
        size = codes.shape[1] if self.group_size == -1 else self.group_size
        place = torch.arange(codes.shape[1], device=codes.device) // size
        value = codes.float().sub_(2 ** (self.bits - 1)).mul_(s[:, place]).add_(z[:, place])
        limit = min(torch.finfo(getattr(torch, spec.dtype)).max, torch.finfo(torch.float32).max)
        return value.clamp_(-limit, limit)
