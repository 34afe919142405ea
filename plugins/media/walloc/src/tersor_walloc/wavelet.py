"""The J-level wavelet packet transform with the CDF 9/7 filters, as differentiable torch operations.

One level along one axis is the lifting scheme (Daubechies & Sweldens, "Factoring wavelet transforms into lifting steps", 1998,
section 7.7) with whole-sample symmetric extension: two predict and two update steps on the even and odd samples, then a scale.
Lifting is exactly invertible for every even length, and the scale `ZETA` makes the basis nearly orthonormal, so squared error
among coefficients is close to squared error among samples. A *packet* transform splits the high band as well as the low one:
after J levels all `2**(J * axes)` bands have the same sampling rate, which is what makes the dimensionality reduction uniform.
"""

import torch
from torch import Tensor

ALPHA, BETA, GAMMA, DELTA = -1.586134342059924, -0.052980118572961, 0.882911075530934, 0.443506852043971
ZETA = 1.149604398860241  # low band times ZETA, high band divided by it


def _next(even: Tensor, axis: int) -> Tensor:
    """even[n + 1], mirrored at the far border."""
    n = even.shape[axis]
    return torch.cat((even.narrow(axis, 1, n - 1), even.narrow(axis, n - 1, 1)), axis)


def _previous(odd: Tensor, axis: int) -> Tensor:
    """odd[n - 1], mirrored at the near border."""
    return torch.cat((odd.narrow(axis, 0, 1), odd.narrow(axis, 0, odd.shape[axis] - 1)), axis)


def split(x: Tensor, axis: int = -1) -> tuple[Tensor, Tensor]:
    """The low and high band along an axis of even length, each of half that length."""
    axis %= x.ndim
    even, odd = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
    odd = odd + ALPHA * (even + _next(even, axis))
    even = even + BETA * (odd + _previous(odd, axis))
    odd = odd + GAMMA * (even + _next(even, axis))
    even = even + DELTA * (odd + _previous(odd, axis))
    return even * ZETA, odd * (-1.0 / ZETA)


def merge(low: Tensor, high: Tensor, axis: int = -1) -> Tensor:
    """The inverse of `split`: the lifting steps backwards."""
    axis %= low.ndim
    even, odd = low * (1.0 / ZETA), high * -ZETA
    even = even - DELTA * (odd + _previous(odd, axis))
    odd = odd - GAMMA * (even + _next(even, axis))
    even = even - BETA * (odd + _previous(odd, axis))
    odd = odd - ALPHA * (even + _next(even, axis))
    return torch.stack((even, odd), axis + 1).flatten(axis, axis + 1)


def analysis(x: Tensor, levels: int) -> Tensor:
    """batch x C x n (or C x h x w) -> batch x C * 2**(levels * axes) x n / 2**levels; the band is the fastest channel index."""
    for _ in range(levels):
        for axis in range(2, x.ndim):
            x = torch.stack(split(x, axis), 2).flatten(1, 2)
    return x


def synthesis(x: Tensor, levels: int) -> Tensor:
    """The inverse of `analysis`."""
    for _ in range(levels):
        for axis in range(x.ndim - 1, 1, -1):
            x = merge(*x.unflatten(1, (-1, 2)).unbind(2), axis)
    return x
