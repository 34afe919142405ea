"""Random Hadamard rotations."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor_kit_weight_quant import Rotation
from tersor_kit_weight_quant.hadamard import _factor, _orders

torch.set_num_threads(1)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 700), seed=st.integers(-5, 2**40), rows=st.integers(0, 3))
def test_any_width_is_orthogonal_and_incoherent(width: int, seed: int, rows: int) -> None:
    turn = Rotation(width, seed)
    assert math.prod(abs(o) for o in turn.orders) == width
    matrix = turn.forward(torch.eye(width))
    assert error(matrix @ matrix.T, torch.eye(width)) < 1e-5
    assert float(matrix.abs().max()) <= math.sqrt(2 / width) * 1.0001
    x = torch.randn(rows, 2, width, generator=torch.Generator().manual_seed(width))
    if rows:
        assert error(turn.forward(x), x.double() @ matrix.double()) < 1e-5
        assert error(turn.inverse(turn.forward(x)), x) < 1e-5
        assert error(turn.forward(turn.inverse(x)), x) < 1e-5
    assert turn.forward(x).shape == turn.inverse(x).shape == x.shape


@pytest.mark.parametrize(
    ("width", "orders"),
    [
        (1, ()), (2, (2,)), (3, (-3,)), (6, (2, -3)), (12, (12,)), (64, (64,)), (128, (2, 64)), (576, (16, 36)), (1536, (2, 64, 12)),
        (4096, (64, 64)), (11008, (32, 344)), (14336, (8, 64, 28)), (5120, (4, 64, 20)), (2053, (-2053,)),
    ],
)  # fmt: skip
def test_factors_of_usual_widths(width: int, orders: tuple[int, ...]) -> None:
    assert _orders(width) == orders
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    y = Rotation(width).forward(x)
    assert error(y.square().sum(1) / x.square().sum(1), torch.ones(2)) < 1e-5
    assert error(Rotation(width).inverse(y), x) < 1e-5


@pytest.mark.parametrize("order", [12, 20, 28, 36, 52, 76, 100, 108, 148, 244, 344])
def test_paley_matrices_have_entries_of_one_and_orthogonal_rows(order: int) -> None:
    matrix = _factor(order).double() * math.sqrt(order)
    signs = matrix.round()
    assert error(matrix, signs) < 1e-5
    assert bool((signs.abs() == 1).all())
    assert torch.equal(signs @ signs.T, order * torch.eye(order, dtype=torch.float64))


def test_by_hand() -> None:
    bits = hashlib.shake_128(b"tersor hadamard 7").digest(1)[0]
    signs = torch.tensor([1.0 - 2 * (bits >> (7 - i) & 1) for i in range(4)])
    hadamard = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert torch.equal(Rotation(4, 7).signs, signs)
    assert torch.equal(Rotation(4, 7).forward(torch.eye(4)), signs[:, None] * hadamard)


def test_the_same_values_everywhere() -> None:
    assert Rotation(16, 0).signs.tolist() == [
        -1.0,
        -1.0,
        -1.0,
        1.0,
        -1.0,
        -1.0,
        -1.0,
        1.0,
        -1.0,
        -1.0,
        1.0,
        1.0,
        -1.0,
        1.0,
        1.0,
        -1.0,
    ]
    assert not torch.equal(Rotation(64, 0).signs, Rotation(64, 1).signs)
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Rotation(24, 3).forward(x), Rotation(24, 3).forward(x))


def test_an_outlier_is_spread_evenly() -> None:
    for width in (576, 1536):
        x = torch.zeros(1, width)
        x[0, 17] = 100.0
        assert error(Rotation(width, 5).forward(x).abs(), torch.full((1, width), 100 / math.sqrt(width))) < 1e-4


def test_conjugate_is_the_gram_of_rotated_inputs() -> None:
    x = torch.randn(50, 36, generator=torch.Generator().manual_seed(1))
    turn = Rotation(36, 2)
    y = turn.forward(x)
    assert error(turn.conjugate(x.T @ x), y.T @ y) < 1e-3


def test_other_dtypes_shapes_and_what_is_refused() -> None:
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(2))
    turn = Rotation(20, 1)
    kept = x.clone()
    assert turn.forward(x.bfloat16()).dtype == torch.float32
    assert error(turn.forward(x[0]), turn.forward(x)[0]) < 1e-6
    assert torch.equal(x, kept)
    one = Rotation(1, 0)
    one.forward(kept[:, :1]).zero_()
    assert torch.equal(x, kept)
    for width in (0, -3):
        with pytest.raises(ValueError, match="allowed: 1 or more"):
            Rotation(width)
    with pytest.raises(ValueError, match="allowed"):
        turn.forward(x.T)
