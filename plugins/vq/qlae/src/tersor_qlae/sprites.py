"""Small pictures whose sources of variation are known: one coloured shape before a coloured background."""

from __future__ import annotations

import torch
from torch import Tensor

SOURCES = {"shape": 3, "size": 3, "x": 6, "y": 6, "colour": 6, "background": 6}  # name: number of values
SIDE = 16


def _hue(share: Tensor, value: float) -> Tensor:
    """RGB, n x 3, of hues 0 to 1 at a saturation of 0.8."""
    ramp = (6 * share[:, None] + torch.tensor([0.0, 4.0, 2.0])) % 6
    return value * (1 - 0.8 * (1 - ((ramp - 3).abs() - 1).clamp(0, 1)))


def render(sources: Tensor) -> Tensor:
    """Pictures, float32 N x 3 x 16 x 16 in [0, 1], of sources, int64 N x 6 below the numbers of ``SOURCES``: a square, disc or cross in three
    sizes at 6 x 6 places, with edges a pixel soft, in one of six hues before one of six darker ones."""
    shape, size, x, y, colour, background = sources.T
    at = torch.arange(SIDE) + 0.5
    across = at - (4 + 1.6 * x[:, None].float())
    down = at - (4 + 1.6 * y[:, None].float())
    dx, dy, half = across[:, None, :].abs(), down[:, :, None].abs(), (2.0 + 0.75 * size.float())[:, None, None]
    square, disc = torch.maximum(dx, dy) - half * 0.9, (dx.square() + dy.square()).sqrt() - half
    cross = torch.minimum(torch.maximum(dx, dy * 3), torch.maximum(dy, dx * 3)) - half * 1.1
    distance = torch.stack([square, disc, cross], 1)[torch.arange(len(sources)), shape]
    inside = (0.5 - distance).clamp(0, 1)[:, None]
    front = _hue(colour.float() / SOURCES["colour"], 1.0)[:, :, None, None]
    behind = _hue(background.float() / SOURCES["background"] + 1 / 12, 0.6)[:, :, None, None]
    return inside * front + (1 - inside) * behind


def every_combination(varied: tuple[str, ...] = tuple(SOURCES)) -> Tensor:
    """All combinations of the ``varied`` sources, int64 N x 6, the last counting fastest: 11,664 of all six. What is not varied is a disc of the
    largest size in the middle, of the first colour before the first background."""
    fixed = {"shape": 1, "size": 2, "x": 2, "y": 2, "colour": 0, "background": 0}
    return torch.cartesian_prod(*(torch.arange(n) if k in varied else torch.tensor([fixed[k]]) for k, n in SOURCES.items()))
