"""Invertible transforms of a layer's inputs, x -> x D P (section 3.1): learned ones, random Hadamard ones, none.

The layer's weight W (out x in) then works as W D^-1 P^-T, so that without rounding nothing changes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tersor_kit_weight_quant.hadamard import Rotation


def factors(width: int) -> tuple[int, int]:
    """The two factors of a width that are nearest to its square root, the smaller one first: 576 = 24 x 24, 1536 = 32 x 48."""
    small = next(n for n in range(math.isqrt(width), 0, -1) if width % n == 0)
    return small, width // small


def kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x (left kron right), by two small products. ``x``: ... x n1 n2; ``left``: n1 x n1; ``right``: n2 x n2."""
    folded = x.reshape(-1, left.shape[0], right.shape[0])
    return (left.T @ (folded @ right)).view(x.shape)


class Invertible(nn.Module):
    """A learned matrix P = U diag(s) V', U and V orthogonal by Cayley's map from skew matrices (float32, n x n).

    It starts as a random orthogonal matrix, as the authors' does. What is learned of s is its logarithm.
    """

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        start = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
        self.register_buffer("start", start)
        self.skew = nn.Parameter(torch.zeros(2, width, width))
        self.scale = nn.Parameter(torch.zeros(width))

    def forward(self) -> tuple[Tensor, Tensor]:
        """P and its transposed inverse."""
        lower = self.skew.tril(-1)
        skew = lower - lower.mT
        eye = torch.eye(skew.shape[-1], device=skew.device)
        u, v = torch.linalg.solve(eye + skew, eye - skew)
        u = u @ self.start
        return (u * self.scale.exp()) @ v.T, (u * (-self.scale).exp()) @ v.T


class Affine(nn.Module):
    """The transform of a group of layers that see the same inputs: a learned scale for each channel, then left kron right."""

    def __init__(self, left: Invertible, right: Invertible, scale: Tensor | None) -> None:
        super().__init__()
        self.left, self.right = left, right
        self.scale = None if scale is None else nn.Parameter(scale.log())

    def begin(self) -> None:
        """Compute the matrices from their parameters, once for each step."""
        self.now = (*self.left(), *self.right())

    def forward(self, x: Tensor) -> Tensor:
        """x D P. ``x``: ... x in."""
        left, _, right, _ = self.now
        return kronecker(x if self.scale is None else x * self.scale.exp(), left, right)

    def weight(self, w: Tensor) -> Tensor:
        """W D^-1 P^-T. ``w``: out x in."""
        _, left, _, right = self.now
        return kronecker(w if self.scale is None else w * (-self.scale).exp(), left, right)

    def parts(self) -> dict[str, Tensor]:
        """What is stored of it, float16: ``left``, ``right`` and ``diagonal``."""
        self.begin()
        out = {"left": self.now[0], "right": self.now[2]}
        if self.scale is not None:
            out["diagonal"] = self.scale.exp().clamp(2.0**-14, 65504.0)
        return {k: v.detach().half().clone() for k, v in out.items()}


class Fixed(nn.Module):
    """No transform, or a random Hadamard rotation of the whole width; nothing is learned, nothing stored."""

    def __init__(self, width: int, kind: str, seed: int) -> None:
        super().__init__()
        self.rotation = Rotation(width, seed) if kind == "hadamard" else None

    def begin(self) -> None:
        """Nothing to compute."""

    def forward(self, x: Tensor) -> Tensor:
        """x Q. ``x``: ... x width."""
        return x if self.rotation is None else self.rotation.forward(x)

    weight = forward  # Q is orthogonal: Q^-T = Q

    def back(self, w: Tensor) -> Tensor:
        """x Q'."""
        return w if self.rotation is None else self.rotation.inverse(w)

    def parts(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}


class Stored:
    """A transform as the file holds it. ``parts``: :meth:`Affine.parts`, or no such names where the transform is fixed.

    Raises KeyError, TypeError or ValueError where the parts do not fit the width.
    """

    def __init__(self, parts: dict[str, Any], width: int, kind: str, seed: int) -> None:
        self.fixed = None if kind == "learned" else Fixed(width, kind, seed)
        if self.fixed is not None:
            return
        self.left, self.right = matrix(parts["left"]), matrix(parts["right"])
        if len(self.left) * len(self.right) != width:
            raise ValueError(f"factors of {len(self.left)} and {len(self.right)} for a width of {width}")
        self.diagonal = finite(parts["diagonal"], (width,)) if "diagonal" in parts else None

    def forward(self, x: Tensor) -> Tensor:
        """x D P in float32."""
        if self.fixed is not None:
            return self.fixed(x)
        return kronecker(x if self.diagonal is None else x * self.diagonal, self.left, self.right)

    def weight(self, w: Tensor) -> Tensor:
        """W D^-1 P^-T, by the inverses of the stored factors in float64."""
        if self.fixed is not None:
            return self.fixed.weight(w)
        w = w if self.diagonal is None else w / self.diagonal
        return kronecker(w, *(torch.linalg.inv(m.double()).T.to(w.dtype) for m in (self.left, self.right)))

    def back(self, w: Tensor) -> Tensor:
        """The weight that acts on untransformed inputs: W P' D."""
        if self.fixed is not None:
            return self.fixed.back(w)
        w = kronecker(w, self.left.T, self.right.T)
        return w if self.diagonal is None else w * self.diagonal


def matrix(x: Any) -> Tensor:
    """A stored square matrix as float32. Raises TypeError or ValueError for anything else."""
    return finite(x, (len(x), len(x)))


def finite(x: Any, shape: tuple[int, ...]) -> Tensor:
    """A stored float16 array of this shape as float32. Raises TypeError or ValueError for anything else."""
    if not isinstance(x, Tensor) or x.dtype != torch.float16:
        raise TypeError("a transform is stored as float16")
    if tuple(x.shape) != shape or not bool(torch.isfinite(x).all()):
        raise ValueError(f"a transform of shape {tuple(x.shape)}, where finite numbers of shape {shape} fit")
    return x.float()
