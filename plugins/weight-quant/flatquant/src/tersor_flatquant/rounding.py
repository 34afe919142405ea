"""The quantizers of the paper (section 2.1), straight-through for training, and the search of their clipping thresholds.

Weights and activations are symmetric: levels -2^(b-1) to 2^(b-1) - 1 times a step for each row (an output channel, or a token), the
step being clip * max|row| / (2^(b-1) - 1). Keys and values are asymmetric, with a step and a zero point for each head of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor_kit_weight_quant import CLIP_RATIOS

ELEMENTS = 1 << 17  # of a weight, worked on at a time: they stay in the cache
SOME = 512  # rows, at most, from which a threshold is searched


class _Round(torch.autograd.Function):
    """x to the nearest of the levels low ... high times a step for each row. Gradients pass straight through the rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        exact = x / step
        level = exact.round().clamp_(low, high)
        ctx.save_for_backward(level, torch.sub(level, exact, out=exact))
        return level * step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        level, lost = ctx.saved_tensors
        inside = lost.abs() <= 0.5
        to_step = (grad * torch.where(inside, lost, level)).sum(-1, keepdim=True)
        return grad * inside, to_step, None, None


def reach(x: Tensor) -> Tensor:
    """max|row|, ... x 1, with a gradient; 1 for a row of zeros."""
    with torch.no_grad():
        place = x.abs().argmax(-1, keepdim=True)
    largest = x.gather(-1, place).abs()
    return torch.where(largest > 0, largest, 1.0)


def symmetric(x: Tensor, bits: int, clip: Tensor | float) -> Tensor:
    """Rows of ``x`` rounded to 2^bits levels around 0. ``clip``: fraction of the largest magnitude that the levels reach."""
    top = 2 ** (bits - 1) - 1
    return _Round.apply(x, reach(x) * clip / max(top, 1), -top - 1, top)  # type: ignore[no-any-return, no-untyped-call]


def asymmetric(x: Tensor, bits: int, clip: Tensor) -> Tensor:
    """Rows of ``x`` rounded to 2^bits levels from clip[0] * min to clip[1] * max, 0 among them."""
    steps = 2**bits - 1
    low, high = x.amin(-1, keepdim=True).clamp(max=0.0) * clip[0], x.amax(-1, keepdim=True).clamp(min=0.0) * clip[1]
    step = (high - low) / steps
    step = torch.where(step > 0, step, 1.0)
    zero = torch.round(-low / step).detach()
    return _Round.apply(x + zero * step, step, 0, steps) - zero * step  # type: ignore[no-any-return, no-untyped-call]


@torch.no_grad()
def row_clips(w: Tensor, bits: int) -> Tensor:
    """For each row the ratio of :data:`CLIP_RATIOS` that leaves the least squared error; out x 1."""
    return torch.cat([_row_clips(rows, bits) for rows in w.split(max(1, ELEMENTS // max(1, w.shape[1])))])


def _row_clips(w: Tensor, bits: int) -> Tensor:
    errors = [(symmetric(w, bits, ratio) - w).square_().sum(1) for ratio in CLIP_RATIOS]
    return torch.tensor(CLIP_RATIOS, device=w.device)[torch.stack(errors).argmin(0)][:, None]


@torch.no_grad()
def clip_of(x: Tensor, bits: int, cache: bool = False) -> float:
    """The one ratio that leaves the least squared error over all rows of ``x``. ``cache``: of the asymmetric levels."""
    x = x.reshape(-1, x.shape[-1])
    x = x[:: -(-x.shape[0] // SOME)]
    if cache:
        errors = [float((asymmetric(x, bits, x.new_full((2,), r)) - x).square_().sum()) for r in CLIP_RATIOS]
    else:
        errors = [float((symmetric(x, bits, r) - x).square_().sum()) for r in CLIP_RATIOS]
    return CLIP_RATIOS[errors.index(min(errors))]
