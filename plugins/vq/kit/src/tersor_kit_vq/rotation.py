"""The gradient that turns with the vectors: the rotation trick (Fifty et al., https://arxiv.org/abs/2410.06424)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_OPPOSITE = -0.999  # cosine below which q + e is taken in float64
_NOTHING = 1e-6  # |e| / |q| below which e has no direction to turn from


def _unit(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Directions of the last dimension (0 of 0), and lengths as the product of two factors, of which neither over- nor underflows."""
    top = x.abs().amax(-1, keepdim=True)
    scaled = x / torch.where(top > 0, top, 1)
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / torch.where(length > 0, length, 1), top, length


def _opposite(e: Tensor, q: Tensor, grad: Tensor) -> Tensor:
    """R^T grad for unit vectors that are nearly opposite, N x d, in float64; a half turn in some plane where they are exactly so."""
    e, q, g = e.double(), q.double(), grad.double()
    e, q = e / e.norm(dim=1, keepdim=True), q / q.norm(dim=1, keepdim=True)
    w = e + q
    length = w.norm(dim=1, keepdim=True)
    axis = torch.zeros_like(e).scatter_(1, e.abs().argmin(1, keepdim=True), 1)
    across = axis - e * (axis * e).sum(1, keepdim=True)
    across = across / across.norm(dim=1, keepdim=True).clamp(min=1e-300)  # 0 in one dimension, where R = -1
    w = torch.where(length > 1e-6, w / length.clamp(min=1e-300), across)
    return (g - 2 * w * (w * g).sum(1, keepdim=True) + 2 * e * (q * g).sum(1, keepdim=True)).to(grad.dtype)


class _RotateTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, values: Tensor) -> Tensor:  # type: ignore[override]
        out = values.to(z.dtype).view_as(values)
        ctx.save_for_backward(z, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        with torch.autocast(grad.device.type, enabled=False):
            g = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
            with torch.no_grad():
                (e, top, length), (q, reach, size) = (_unit(x.detach().to(g.dtype)) for x in ctx.saved_tensors)
                cosine = (e * q).sum(-1, keepdim=True)
                known = top * length > reach * size * _NOTHING
                scale = torch.where(known, reach / torch.where(known, top, 1) * (size / torch.where(known, length, 1)), 1)
                opposite = (cosine[..., 0] < _OPPOSITE) & known[..., 0]
                share = 1 / (1 + cosine).clamp(min=1e-6)  # 2 / |e + q|^2
            # R^T g = g - 2 w (w.g) + 2 e (q.g) with w = (e + q) / |e + q|
            along, towards = (e * g).sum(-1, keepdim=True), (q * g).sum(-1, keepdim=True)
            mirrored = (along + towards) * share
            turned = g + e * (2 * towards - mirrored) - q * mirrored
            if bool(opposite.any()):
                turned = turned.index_put((opposite,), _opposite(e[opposite], q[opposite], g[opposite]))
            return (torch.where(known, turned * scale, g)).to(grad.dtype), None


def rotate_to(z: Tensor, values: Tensor) -> Tensor:
    """``values`` exactly, in the element type of ``z``; the gradient reaches ``z`` rotated and rescaled as ``z`` is to ``values``.

    ``z``, ``values``: float ... x d of one shape. Each vector e of ``z`` and its q of ``values`` are seen as q = (|q| / |e|) R e, R the rotation
    in the plane of e and q that takes one direction to the other, both factors constants (section 4.2): the gradient of e is (|q| / |e|) R^T g.
    R is the two reflections I - 2 w w^T + 2 q e^T of unit vectors e and q, w their normalised sum (section 4.3, after Householder): O(N d)
    and no matrices. An e below a millionth of q's length has no direction, and gets g itself, as by :func:`straight_through`; opposite
    vectors turn by half in a plane through e. No gradient goes to ``values``.
    """
    return _RotateTo.apply(z, values)  # type: ignore[no-any-return]
