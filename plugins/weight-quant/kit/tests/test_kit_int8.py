"""Integer products against int64 arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor_kit_weight_quant import int8
from tersor_kit_weight_quant.int8 import Int8Linear, Int8Matrix, absmax

torch.set_num_threads(1)
QUICK = settings(max_examples=40, deadline=None)


class Plain(Int8Linear):
    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None = None, whole: bool = False) -> None:
        super().__init__(scale, bias, whole)
        self.register_buffer("codes", codes)

    def matrix(self) -> Tensor:
        return self.codes  # type: ignore[return-value]


def integers(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@QUICK
@given(rows=st.integers(0, 40), columns=st.integers(1, 70), out=st.integers(1, 40), seed=st.integers(0, 99))
def test_products_are_those_of_int64(rows: int, columns: int, out: int, seed: int) -> None:
    x, w = integers(rows, columns, seed).clamp_(-127), integers(out, columns, seed + 1)
    true = (x.long() @ w.long().T).float()
    assert torch.equal(Int8Matrix(w)(x), true)
    assert torch.equal(int8.in_float(x, w), true)
    assert torch.equal(int8._padded(x, w).float() if rows else true, true)


@pytest.mark.parametrize("columns", [1023, 1024, 1025, 4096, 65_536, 70_001])
@pytest.mark.parametrize("rows", [1, 9])
def test_the_largest_sums_do_not_saturate(columns: int, rows: int) -> None:
    x = torch.full((rows, columns), 127, dtype=torch.int8)
    x[1::2] = -127
    w = torch.full((24, columns), -128, dtype=torch.int8)
    w[::2] = 127
    true = (x.long() @ w.long().T).float()  # one rounding, as in the product
    assert torch.equal(Int8Matrix(w)(x), true)
    if columns <= 65_536:
        assert torch.equal(int8.in_float(x, w), true)


def test_without_a_trusted_kernel_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = integers(17, 300, 0).clamp_(-127), integers(33, 300, 1)
    usual = Int8Matrix(w)(x)
    monkeypatch.setattr(int8, "kernel_is_exact", lambda: False)
    assert torch.equal(Int8Matrix(w)(x), usual)


@QUICK
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 40), power=st.integers(-36, 36), whole=st.booleans(), seed=st.integers(0, 99)
)
def test_absmax_is_within_half_a_step(rows: int, columns: int, power: int, whole: bool, seed: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    codes, scale = absmax(x, whole)
    assert scale.shape == (1 if whole else rows, 1)
    assert int(codes.abs().max()) <= 127
    assert bool(((codes * scale.double() - x).abs() <= 0.5001 * scale).all())
    assert int(codes.abs().max()) == 127
    zero, _ = absmax(x * 0, whole)
    assert not bool(zero.any())


def test_a_layer_is_the_product_scaled_back() -> None:
    w, scale, bias = integers(6, 10, 0), torch.rand(6, generator=torch.Generator().manual_seed(1)), torch.arange(6.0)
    x = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(2))
    for whole in (False, True):
        found = Plain(w, scale, bias, whole)(x)
        rows = x.view(-1, 10).double()
        size = rows.abs().amax() / 127 if whole else rows.abs().amax(1, keepdim=True) / 127
        true = ((rows / size).round() @ w.double().T * size * scale + bias).view(2, 5, 6)
        assert torch.allclose(found.double(), true, rtol=1e-5, atol=1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        assert Plain(w, scale)(x.to(dtype)).dtype == dtype
    assert Plain(w, scale)(x[:, :0]).shape == (2, 0, 6)
    x[0, 0, 0] = torch.inf
    assert bool(Plain(w, scale)(x)[0, 0].isnan().all())
    assert bool(Plain(w, scale)(x)[0, 1:].isfinite().all())


def test_gradients_are_those_of_the_dense_layer() -> None:
    layer = Plain(integers(6, 10, 0), torch.rand(6), torch.zeros(6))
    x = torch.randn(4, 10, requires_grad=True)
    grad = torch.randn(4, 6)
    layer(x).backward(grad)
    assert torch.allclose(x.grad, grad @ layer.weight, atol=1e-5)
    assert torch.allclose(layer.bias.grad, grad.sum(0), atol=1e-5)


def test_the_matrix_follows_the_buffers() -> None:
    layer = Plain(integers(6, 10, 0), torch.ones(6))
    x = torch.randn(4, 10)
    first = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), first)
    layer.load_state_dict({"codes": integers(6, 10, 5), "scale": torch.ones(6)})
    assert torch.equal(layer(x), Plain(integers(6, 10, 5), torch.ones(6))(x))
    layer.load_state_dict({"codes": integers(6, 10, 7), "scale": torch.ones(6)}, assign=True)
    assert torch.equal(layer(x), Plain(integers(6, 10, 7), torch.ones(6))(x))
    with torch.inference_mode():
        assert torch.equal(twin(x), first)
