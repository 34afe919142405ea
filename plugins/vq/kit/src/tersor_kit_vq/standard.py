"""Vectors at mean 0 and deviation 1, for methods that learn plain vectors by steps of a fixed size."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def standard(x: Tensor, centre: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(x - offset) / scale, and the two scalars: the mean and standard deviation of all elements (scale 1 where that is 0 or there are none).

    ``x``: float32 N x d, finite. Without ``centre`` the offset is 0 and the scale the root of the mean square.
    """
    if x.numel() == 0:
        return x, x.new_ones(()), x.new_zeros(())
    wide = x.double()  # squares of large elements would leave float32
    offset = wide.mean() if centre else wide.new_zeros(())
    scale = (wide - offset).square().mean().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return ((wide - offset) / scale).float(), scale.float(), offset.float()
