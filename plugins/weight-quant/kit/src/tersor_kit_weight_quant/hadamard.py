"""Random Hadamard rotations of any width: they spread what is concentrated in few coordinates evenly over all of them.

A rotation is Q = D H / sqrt(n): D random signs, H a Hadamard matrix, which is a Kronecker product of small factors, so that x Q costs
n times the sum of the factors' orders instead of n squared. The factors of a width n = 2^a m, m odd:

- Sylvester matrices of orders up to 64 for powers of two;
- where m > 1, a matrix of order 2^b m by one of Paley's constructions (1933): q + 1 for a prime power q = 3 mod 4, or 2 (q + 1) for
  q = 1 mod 4, b as small as it can be: 576 = 16 x 36, 1536 = 2 x 64 x 12, 11008 = 32 x 344, 14336 = 8 x 64 x 28;
- where there is none up to order 1024 (every odd n is such a case), the Hartley matrix cos + sin of 2 pi j k / m instead: real,
  symmetric, orthogonal, with entries up to sqrt(2 / m) where a Hadamard matrix has 1 / sqrt(m).

So no entry of Q is above sqrt(2 / n) in any width. The signs come from SHAKE-128, and are the same wherever they are drawn.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

_SYLVESTER = 64  # the largest factor that is a power of two
_DENSE = 1024  # the largest factor of another order; a longer Hartley transform goes through the FFT


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix Q = D H / sqrt(width) that ``seed`` (any integer) names; width x width, 1 or more.

    Raises ValueError for a width below 1.
    """

    width: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width} is not allowed; allowed: 1 or more")

    @cached_property
    def signs(self) -> Tensor:
        """The diagonal of D: +1 and -1, float32, ``width`` of them."""
        raw = hashlib.shake_128(f"tersor hadamard {self.seed}".encode()).digest(-(-self.width // 8))
        bits = np.unpackbits(np.frombuffer(raw, np.uint8), count=self.width)
        return torch.from_numpy(1 - 2 * bits.astype(np.float32))

    @cached_property
    def orders(self) -> tuple[int, ...]:
        """The orders of the Kronecker factors, outermost first; a negative one is a Hartley matrix."""
        return _orders(self.width)

    def forward(self, x: Tensor) -> Tensor:
        """x Q: the last axis rotated. ``x``: ... x width, any float dtype; returns float32 of the same shape."""
        return self._multiply(self._checked(x) * self.signs.to(x.device), False)

    def inverse(self, x: Tensor) -> Tensor:
        """x Q', the inverse of :meth:`forward`. ``x``: ... x width, any float dtype; returns float32 of the same shape."""
        return self._multiply(self._checked(x), True).mul_(self.signs.to(x.device))

    def conjugate(self, hessian: Tensor) -> Tensor:
        """Q'H Q for a symmetric ``hessian`` (width x width): the Gram matrix X'X of inputs that were rotated, x -> x Q."""
        return self.forward(self.forward(hessian).T.contiguous())

    def _checked(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.width,):
            raise ValueError(f"shape {tuple(x.shape)} is not allowed; allowed: ... x {self.width}")
        return x.float()

    def _multiply(self, x: Tensor, transposed: bool) -> Tensor:
        """x H / sqrt(n), or x H' / sqrt(n), one Kronecker factor after another."""
        shape, before = x.shape, 1
        for order in self.orders:
            size = abs(order)
            after = self.width // (before * size)
            if size > _DENSE:
                spectrum = torch.fft.fft(x.reshape(-1, size, after), dim=1)
                x = (spectrum.real - spectrum.imag) / math.sqrt(size)
            else:
                factor = _factor(order).to(x.device)
                factor = factor.T if transposed else factor
                # One product with the matrix on the right where the axis is the last one; else with its transpose on the left.
                x = x.reshape(-1, size) @ factor if after == 1 else factor.T @ x.reshape(-1, size, after)
            before *= size
        return x.reshape(shape) if self.orders else x.clone()


@lru_cache(maxsize=256)
def _orders(width: int) -> tuple[int, ...]:
    two = width & -width
    odd = width // two
    other = ()
    if odd > 1:
        found = [2**b * odd for b in range(2, two.bit_length()) if 2**b * odd <= _DENSE and _paley_field(2**b * odd)]
        other = (found[0] if found else -odd,)
        two = width // abs(other[0])
    small = []
    while two > 1:
        small.append(min(two, _SYLVESTER))
        two //= small[-1]
    return (*sorted(small), *other)


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) where q = p^k for an odd prime p, else None."""
    p = next((d for d in range(3, math.isqrt(q) + 1, 2) if q % d == 0), q)
    k = round(math.log(q, p)) if q > 1 else 0
    return (p, k) if q % 2 and k and p**k == q else None


def _paley_field(order: int) -> int | None:
    """The size of the finite field from which Paley's first or second construction makes a matrix of ``order``."""
    if order % 4 == 0 and (order - 1) % 4 == 3 and _prime_power(order - 1):
        return order - 1
    q = order // 2 - 1
    return q if order % 4 == 0 and q % 4 == 1 and _prime_power(q) else None


@lru_cache(maxsize=32)
def _factor(order: int) -> Tensor:
    """An orthogonal matrix of |order|, float32, divided by sqrt(|order|): Sylvester, Paley, or Hartley where it is negative."""
    n = abs(order)
    if order < 0:
        turns = torch.arange(n) * torch.arange(n)[:, None] % n
        angle = turns.double() * (2 * math.pi / n)
        matrix = angle.cos() + angle.sin()
    elif n & (n - 1) == 0:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < n:
            matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    else:
        matrix = _paley(n)
    return (matrix / math.sqrt(n)).float()


def _paley(order: int) -> Tensor:
    """Paley's Hadamard matrix: entries +1 and -1, float64, order x order."""
    q = _paley_field(order)
    assert q is not None  # the caller chose the order so
    jacobsthal = _characters(q)
    if q == order - 1:  # I + S, S the skew border of the Jacobsthal matrix
        skew = torch.zeros(order, order, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, jacobsthal
        return skew + torch.eye(order, dtype=torch.float64)
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, jacobsthal
    one, diagonal = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
    return torch.kron(conference, one) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)


def _characters(q: int) -> Tensor:
    """The Jacobsthal matrix of the field of q elements: 1 where i - j is a square, -1 where it is none, 0 where i = j."""
    field = _prime_power(q)
    assert field is not None
    p, k = field
    digits = torch.tensor(list(product(range(p), repeat=k)))[
        :, torch.arange(k - 1, -1, -1)
    ]  # element -> coefficients, lowest first
    weights = p ** torch.arange(k)
    squares = (_square_mod(digits, p, _irreducible(p, k)) * weights).sum(1)
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[squares] = 1.0
    character[0] = 0.0
    difference = ((digits[:, None] - digits[None]) % p * weights).sum(2)
    return character[difference]


def _irreducible(p: int, k: int) -> Tensor:
    """Coefficients c of a monic irreducible x^k + c[k-1] x^(k-1) + ... + c[0] over the integers mod p (k above 1).

    It is one where squaring maps the residues onto exactly (p^k + 1) / 2 of them, as it does in a field of that size and in no other
    ring of residues.
    """
    residues = torch.tensor(list(product(range(p), repeat=k)))
    weights = p ** torch.arange(k)
    for c in product(range(p), repeat=k):
        poly = torch.tensor(c)
        squares = (_square_mod(residues, p, poly) * weights).sum(1)
        if k == 1 or len(squares.unique()) == (p**k + 1) // 2:
            return poly
    raise AssertionError("there is an irreducible polynomial of every degree")


def _square_mod(x: Tensor, p: int, poly: Tensor) -> Tensor:
    """Squares of polynomials (rows of coefficients, lowest first) modulo the monic ``poly`` and p."""
    k = x.shape[1]
    full = x.new_zeros(len(x), 2 * k - 1)
    for i in range(k):
        full[:, i : i + k] += x[:, i : i + 1] * x
    for i in range(2 * k - 2, k - 1, -1):
        full[:, i - k : i] -= full[:, i : i + 1] * poly
    return full[:, :k] % p
