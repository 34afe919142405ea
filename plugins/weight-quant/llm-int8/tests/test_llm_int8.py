"""LLM.int8() against the paper's equations in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tersor
from tersor.model import compress_layers
from tersor.testing import assert_conforms

torch.set_num_threads(1)
QUICK = settings(max_examples=30, deadline=None)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def paper(x: Tensor, w: Tensor, threshold: float, whole: bool) -> Tensor:
    """X W' by equations 8 of the paper, in float64 and int64."""

    def int8(m: Tensor) -> tuple[Tensor, Tensor]:
        c = (m.abs().amax() if whole else m.abs().amax(1, keepdim=True)) / 127
        return (m / c).nan_to_num(0).round().long(), c

    x, w = x.double(), w.double()
    out = (x.abs() >= threshold).any(0) & (threshold > 0)
    w8, cw = int8(w)
    x8, cx = int8(x * ~out)
    regular = (x8 @ w8.T) * cx * (cw if whole else cw.T)
    return regular + x[:, out] @ (w8 * cw)[:, out].T


@QUICK
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 40), out=st.integers(1, 20), outliers=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 2.0, 6.0]), whole=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_layer_is_the_papers_product(
    rows: int, columns: int, out: int, outliers: int, threshold: float, whole: bool, seed: int
) -> None:
    w, x = rand(out, columns, seed=seed), rand(rows, columns, seed=seed + 1)
    x[:, :outliers] *= 30
    method = tersor.quantizer("llm-int8", threshold=threshold, granularity="tensor" if whole else "vector")
    layer = method.module(method.quantize(w))
    true = paper(x, w, threshold, whole)
    # a value half way between two codes may go either way in float32: one step of x times one weight
    assert float((layer(x) - true).abs().max()) <= 1e-4 * float(true.abs().max()) + 0.02 * float(w.abs().max())
    assert float((layer(x) - true).norm() / true.norm()) < 0.02


def test_outliers_are_found_in_each_call() -> None:
    method = tersor.quantizer("llm-int8")
    layer = method.module(method.quantize(rand(8, 20)))
    x = rand(5, 20, seed=1)
    assert layer.outliers(x).tolist() == []
    x[3, 7], x[0, 11] = 6.0, -40.0
    assert layer.outliers(x).tolist() == [7, 11]
    assert layer.outliers(x[:3]).tolist() == [11]
    assert tersor.quantizer("llm-int8", threshold=0.0).module(method.quantize(rand(8, 20))).outliers(x).tolist() == [7, 11]


def test_decomposition_keeps_what_outliers_destroy() -> None:
    w, x = rand(64, 256), rand(40, 256, seed=1)
    x[:, 5] *= 100
    true = x @ w.T
    errors = {}
    for settings_ in ({}, {"threshold": 0.0}, {"threshold": 0.0, "granularity": "tensor"}):
        method = tersor.quantizer("llm-int8", **settings_)
        errors[str(method)] = float((method.module(method.quantize(w))(x) - true).norm() / true.norm())
    plain, off, tensor = errors.values()
    assert plain < 0.3 * off
    assert off < tensor


def test_codes_and_scales() -> None:
    w = torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0]])
    method = tersor.quantizer("llm-int8")
    codes = method.quantize(w)
    assert codes.parts["codes"].tolist() == [[127, -50, 0], [0, 0, 0]]
    assert torch.allclose(codes.parts["scale"][:1], torch.tensor([0.01]))
    assert torch.allclose(method.dequantize(codes), torch.tensor([[1.27, -0.5, 0.0], [0.0, 0.0, 0.0]]))
    w = rand(20, 30)
    for settings_ in ({}, {"granularity": "tensor"}):
        method = tersor.quantizer("llm-int8", **settings_)
        codes = method.quantize(w)
        assert torch.allclose(method.uniform(codes).dense(), method.dequantize(codes))
        assert torch.allclose(method.module(codes).weight, method.dequantize(codes))
        assert codes.nbytes < 20 * 30 + 4 * 20 + 200
    assert [str(m) for m in tersor.quantizer("llm-int8").at_bits(8)] == ["llm-int8"]
    assert tersor.quantizer("llm-int8").at_bits(4) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_weights(dtype: torch.dtype) -> None:
    method = tersor.quantizer("llm-int8")
    for size in (torch.finfo(dtype).max, 200 * torch.finfo(dtype).tiny):
        w = (rand(3, 9).clamp(-1, 1) * size).to(dtype)
        w[0, 0] = size
        back = method.dequantize(method.quantize(w))
        assert bool(back.isfinite().all())
        assert float((back.double() - w.double()).abs().max()) <= 0.01 * size


def test_networks_of_layers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5, bias=False))
    small = copy.deepcopy(net)
    compress_layers(small, tersor.quantizer("llm-int8"))
    assert [type(m).__name__ for m in small] == ["LLMInt8Linear", "ReLU", "LLMInt8Linear"]
    x = rand(7, 12)
    assert torch.allclose(small(x), net(x), atol=0.05)
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    changed = copy.deepcopy(conv)
    compress_layers(changed, tersor.quantizer("llm-int8"))
    assert torch.allclose(changed(rand(2, 3, 4, 4)), conv(rand(2, 3, 4, 4)), atol=0.1)


def test_wrong_settings_and_inputs() -> None:
    for wrong in ({"threshold": -1.0}, {"granularity": "row"}):
        with pytest.raises(tersor.ConfigError):
            tersor.quantizer("llm-int8", **wrong)
    with pytest.raises(tersor.InputError):
        tersor.quantizer("llm-int8").quantize(torch.full((2, 2), torch.nan))
    codes = tersor.quantizer("llm-int8").quantize(rand(4, 6))
    codes.parts["scale"] = codes.parts["scale"][:2]
    with pytest.raises(tersor.CorruptPayloadError):
        tersor.quantizer("llm-int8").dequantize(codes)


def test_conformance() -> None:
    assert_conforms("llm-int8", max_examples=3, fresh_process=False)
