"""COMQ: A Backpropagation-Free Algorithm for Post-Training Quantization (https://arxiv.org/abs/2403.07134)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor import Calibration, ConfigError, Quantizer, Spec, Uniform, at_least, between, field, method, one_of
from tersor_kit_weight_quant import CLIP_RATIOS, Grid, damped, descend, exponent_of, fit_grid, gram, load, normalise, store

_CHUNK = 128  # rows that are worked on at a time where every row has an order of its own


@method
class COMQ(Quantizer):
    """The layer's error |X W' - X Q'|^2 is minimised over one bit-code, then over one scale, at a time, all others held (section 3).

    Weights: float, out x in. Calibration: the layer's inputs, samples x in, or their X'X, in x in; nothing else of them is needed.
    A quantized weight is a scale times an integer code, of 2^bits consecutive integers that reach from the least to the greatest
    weight of the channel. Starting from the weights themselves, ``sweeps`` times:

    - bit-codes: the best real value of a weight given all others of its channel is a dot product with its input's column of X'X; it
      is rounded to the nearest code (equations of section 3.1). Weights with large |w| |x| come first, as their rounding errors are
      the largest and the most weights are still free to make up for them.
    - scales: the least squares solution <X q, X w> / |X q|^2, of a channel (``group_size`` -1), of each group in turn, or of the layer.

    ``order``: ``greedy`` is the paper's, each channel in an order of its own. ``shared`` is one order for the layer, by the mean of |w|
    over the channels: a sweep is then one matrix product, several times faster, and its result is no worse in practice.
    ``cyclic`` is the order of the columns. ``clip`` starts from the range of least squared error instead of the full one; the paper
    shrinks the full range by a constant for each bit width. ``damp``: the paper has none (0); with it, weights of inputs that were
    rarely active stay near their values.

    Stored: codes and zero points at ``bits`` bits, scales in float16 (each is rounded before codes are chosen on it).

    Raises :class:`tersor.ConfigError` for a group size of 0 or below -1 and for ``per_layer`` with groups,
    :class:`tersor.InputError` for NaN and infinity in the weights, :class:`tersor.CalibrationError` for calibration data that is
    missing, of another width, all zero or not finite.
    """

    name = "comq"
    domains = ("weight",)
    native = "torch"
    calibration = "required"

    bits: int = field(4, between(2, 8), help="bits per weight")
    group_size: int = field(-1, help="weights that share a scale; -1: a whole row (an output channel)")
    per_layer: bool = field(False, help="one scale and one zero point for the whole matrix")
    sym: bool = field(False, help="symmetric levels, without zero points")
    clip: bool = field(True, help="start from the range of least squared error, searched for each scale")
    order: str = field(
        "shared", one_of("shared", "greedy", "cyclic"), help="greedy: an order for each row, as in the paper; slower"
    )
    sweeps: int = field(3, at_least(1), help="passes over all codes and scales (K in the paper)")
    damp: float = field(0.01, between(0, 1), help="damping, as a fraction of the Hessian's mean diagonal")

    def __attrs_post_init__(self) -> None:
        if self.group_size < 1 and self.group_size != -1:
            raise ConfigError(f"comq: group_size={self.group_size} is not allowed; allowed: 1 or more, or -1 for a whole row")
        if self.per_layer and self.group_size != -1:
            raise ConfigError(f"comq: per_layer with group_size={self.group_size}; allowed: per_layer with -1")

    @classmethod
    def examples(cls) -> list[COMQ]:
        """For the conformance kit."""
        return [
            cls(),
            cls(bits=3, group_size=5, order="greedy", sym=True, sweeps=2),
            cls(per_layer=True, clip=False, order="cyclic"),
        ]

    def _quantize(self, x: Tensor, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        rows, n = x.shape
        size = n if self.group_size == -1 else self.group_size
        hessian = damped(gram(calibration, n), self.damp)
        # initial scale and range of bit-codes
        flat = x.reshape(self._flat(spec))
        grid = fit_grid(flat, self.bits, self.group_size, self.sym, CLIP_RATIOS if self.clip else ())
        scale = grid.scale.float().T.expand(-1, rows).contiguous()  # groups x out
        zero = torch.full_like(scale, 2 ** (self.bits - 1)) if grid.zero is None else grid.zero.float().T.expand(-1, rows)
        low = -zero
        high = low + (2**self.bits - 1)

        columns = normalise(x, exponent_of(x)).T.contiguous()  # in x out
        order = torch.arange(n, device=x.device)
        influence = hessian.diagonal().sqrt()[:, None] * columns.abs()
        if self.order == "shared":
            order = influence.mean(1).argsort(descending=True, stable=True)
            columns, hessian = columns[order], hessian[order][:, order].contiguous()
        place = order // size  # the group of each column
        at = place.tolist()
        error = torch.zeros_like(columns)  # of the weights themselves
        code = torch.zeros_like(columns)

        def round_(k: int, w: Tensor, lost: Tensor) -> None:
            g = at[k]
            torch.clamp(w.mul_(inverse[g]).round_(), low[g], high[g], out=code[k])
            lost.addcmul_(code[k], scale[g], value=-1)

        for _ in range(self.sweeps):
            inverse = torch.where(scale > 0, 1 / scale, 0.0)
            if self.order == "greedy":
                _descend_greedily(columns, error, code, hessian, influence, scale, low, high, place)
            else:
                descend(columns, error, hessian, round_)
            for g in range(scale.shape[0]):
                mine = slice(None) if scale.shape[0] == 1 else (place == g).nonzero()[:, 0]
                self._rescale(scale[g], code[mine], error, hessian[mine], mine)

        code -= low[place]
        codes = torch.empty(n, rows, dtype=torch.uint8, device=x.device)
        codes[order] = code.to(torch.uint8)
        grid.scale.copy_(scale.T[: flat.shape[0]])
        return store(grid, codes.T.reshape(flat.shape))

    def _rescale(self, scale: Tensor, code: Tensor, error: Tensor, hessian: Tensor, mine: Any) -> None:
        """The best scale (out) of one group given all else, in place; ``code``: of the group's columns, in it x out."""
        slope = (hessian @ error).mul_(code).sum(0)  # <X q, X e>, e being what is lost at the present scale
        curvature = (hessian[:, mine] @ code).mul_(code).sum(0)  # |X q|^2
        if self.per_layer:
            slope, curvature = slope.sum(), curvature.sum()
        best = scale + torch.where(curvature > 0, slope / curvature, 0.0)
        best = torch.where((best > 0) & (best < 65504), best, scale).half().float()
        error[mine] += code * (scale - best)
        scale.copy_(best)

    def _flat(self, spec: Spec) -> tuple[int, int]:
        """The matrix that scales belong to the rows of: with ``per_layer`` a single row."""
        rows, n = spec.shape
        return (1, rows * n) if self.per_layer else (rows, n)

    def _uniform(self, parts: dict[str, Any], spec: Spec) -> Uniform | None:
        grid, codes = load(parts, self._flat(spec), self.bits, self.group_size, self.sym)
        rows, n = spec.shape
        scale, zero = grid.scale.expand(rows, -1), None if grid.zero is None else grid.zero.expand(rows, -1)
        size = n if self.per_layer else grid.group_size
        return Grid(scale, zero, self.bits, size, exponent=grid.exponent).uniform(codes.view(rows, n))

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        grid, codes = load(parts, self._flat(spec), self.bits, self.group_size, self.sym)
        return grid.dequantize(codes, getattr(torch, spec.dtype)).view(spec.shape)


def _descend_greedily(
    columns: Tensor, error: Tensor, code: Tensor, hessian: Tensor, influence: Tensor, scale: Tensor, low: Tensor, high: Tensor,
    place: Tensor,
) -> None:  # fmt: skip
    """One sweep over the bit-codes, every row in its own order; ``error`` and ``code`` (in x out) are brought up to date in place."""
    n = columns.shape[0]
    diagonal = hessian.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    block = min(
        max(32, n // 12), 256
    )  # positions between matrix products: their cost, n / block products, against that of gathering
    flat = hessian.reshape(-1)
    for rows in torch.arange(columns.shape[1], device=columns.device).split(_CHUNK):
        order = influence[:, rows].T.argsort(dim=1, descending=True, stable=True)
        lost, weight, level = (t[:, rows].T.contiguous() for t in (error, columns, code))
        steps, lows, highs = (t[:, rows].T.contiguous() for t in (scale, low, high))
        for here in order.split(block, 1):  # rows x block: the columns that each row visits next
            gradient = (lost @ hessian).gather(1, here)
            between = flat[here.T[:, :, None] * n + here[None]]  # block x rows x block: of X'X among these columns
            w, e, group, weigh = weight.gather(1, here), lost.gather(1, here), place[here], inverse[here]
            step, least, most = (t.gather(1, group) for t in (steps, lows, highs))
            new = torch.empty_like(w)
            for k in range(here.shape[1]):
                best = w[:, k] - e[:, k] + gradient[:, k] * weigh[:, k]
                s = step[:, k]
                new[:, k] = torch.where(s > 0, best / s, 0.0).round_().clamp_(least[:, k], most[:, k])
                changed = w[:, k] - new[:, k] * s - e[:, k]
                e[:, k] += changed
                gradient.addcmul_(between[k], changed[:, None])
            lost.scatter_(1, here, e)
            level.scatter_(1, here, new)
        error[:, rows] = lost.T
        code[:, rows] = level.T
