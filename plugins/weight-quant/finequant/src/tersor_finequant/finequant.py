"""FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs (https://arxiv.org/abs/2308.09723)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor import Calibration, Quantizer, Spec, Uniform, at_least, between, field, method
from tersor_kit_weight_quant import CLIP_RATIOS, Grid, fit_grid, load, store


@method
class FineQuant(Quantizer):
    """Weights are rounded in groups whose size is chosen for each matrix, from its weights alone.

    Weights: float, out x in. A few outliers stretch the range that a whole output's weights share, and with it every step between
    levels. Small groups confine them, and cost a scale each. The heuristic on the range of quantization decides how far to go:

    1. start with one group for each output (a column of the paper's in x out layout, a row of this one);
    2. halve the groups, and take the steps delta that both sizes would have (their range over 2^bits - 1);
    3. while the mean step shrinks by more than ``alpha`` of itself and groups are not below ``smallest``, go on at 2.

    Halving a group of independent normal weights shrinks its range by 6 to 13 %, the less the larger the group. With the default
    ``alpha``, such matrices get small groups, and those whose range is the same all over (weights of even size) stay as they are.
    From 0.09 on only matrices with outliers are split. ``alpha=1`` is one group for each output, ``alpha=0`` the smallest
    groups where that helps at all.

    Levels are symmetric, with the step 2 max|w| / (2^bits - 1), as weights are nearly so; ``sym=false`` gives zero points.
    Stored: codes at ``bits`` bits, scales in float16, zero points at ``bits`` bits, and the group size, one for the matrix.

    Raises :class:`tersor.InputError` for NaN and infinity.
    """

    name = "finequant"
    domains = ("weight",)
    native = "torch"

    bits: int = field(4, between(2, 8), help="bits per weight")
    alpha: float = field(0.05, between(0, 1), help="by how much of itself the mean step must shrink for groups to be halved")
    smallest: int = field(64, at_least(1), help="groups are not halved to fewer weights than this")
    sym: bool = field(True, help="symmetric levels, without zero points")
    clip: bool = field(False, help="search the range of each group for the least squared error")

    @classmethod
    def examples(cls) -> list[FineQuant]:
        """For the conformance kit."""
        return [cls(), cls(bits=3, alpha=0.0, smallest=2, sym=False, clip=True)]

    def granularity(self, x: Tensor) -> int:
        """The number of weights in a group that the heuristic chooses for ``x`` (float, out x in): in, or a half, a quarter ... of it.

        An odd number is halved upwards, so that the last group of a row may be shorter.
        """
        size = max(x.shape[1], 1)
        step = self._mean_step(x, size)
        while (half := (size + 1) // 2) < size and half >= self.smallest:
            finer = self._mean_step(x, half)
            if not step - finer > self.alpha * step:
                break
            size, step = half, finer
        return size

    def _mean_step(self, x: Tensor, size: int) -> float:
        """The mean over all groups of ``size`` weights of the step between levels."""
        return float(fit_grid(x, self.bits, size, self.sym).scale.float().mean())

    def _quantize(self, x: Tensor, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        size = self.granularity(x)
        grid = fit_grid(x, self.bits, size, self.sym, CLIP_RATIOS if self.clip else ())
        return {**store(grid, grid.quantize(x)), "group_size": size}

    def _load(self, parts: dict[str, Any], spec: Spec) -> tuple[Grid, Tensor]:
        rows, columns = spec.shape
        size = parts["group_size"]
        if type(size) is not int or not 1 <= size <= columns:
            raise ValueError(f"group_size: {size!r}, where a number from 1 to {columns} fits")
        return load(parts, (rows, columns), self.bits, size, self.sym)

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        grid, codes = self._load(parts, spec)
        return grid.dequantize(codes, getattr(torch, spec.dtype))

    def _uniform(self, parts: dict[str, Any], spec: Spec) -> Uniform | None:
        grid, codes = self._load(parts, spec)
        return grid.uniform(codes)
