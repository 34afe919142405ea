"""GPTVQ against the paper's algorithm, step by step in float64, and against what its parts promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor import Calibration
from tersor.testing import assert_conforms
from tersor_gptvq.gptvq import _fit_scales, _scales_of
from tersor_kit_weight_quant import unpack

torch.set_num_threads(1)


def layer(out: int, columns: int, samples: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns // 3 + 1, generator=g) @ torch.randn(columns // 3 + 1, columns, generator=g)
    x += 0.3 * torch.randn(samples, columns, generator=g)
    x[:, ::7] *= 4
    return torch.randn(out, columns, generator=g), x


def loss(w: torch.Tensor, q: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (w - q).T).double().square().sum() / (x @ w.T).double().square().sum())


@pytest.mark.parametrize("dim", [1, 2, 4])
@pytest.mark.parametrize("act_order", [False, True])
def test_assignments_are_those_of_the_algorithm(dim: int, act_order: bool) -> None:
    """With the file's codebooks: every step of columns at its best values given the rounded ones, nearest under the rest's Hessian."""
    w, x = layer(10, 24)
    m = tersor.quantizer("gptvq", dim=dim, codebook="float16", update=False, overhead=8.0, act_order=act_order)
    codes = m.quantize(w, x)
    q = m.dequantize(codes).double()
    h = (x.T @ x).double()
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(24)
    h = (h + 0.01 * h.diagonal().mean() * torch.eye(24))[order][:, order]
    wo, qo = w.double()[:, order], q[:, order]
    at = m._layout(10, 24)
    books = codes.parts["books"].double() * 2.0 ** codes.meta["exponent"]
    ids = unpack(torch.as_tensor(codes.parts["codes"]), 2 * dim, 24 // dim * 10).view(-1, 10).long()
    wrong = 0
    for k in range(0, 24, dim):
        lost = (wo - qo)[:, :k]
        best = wo[:, k:] + torch.linalg.solve(h[k:, k:], h[k:, :k] @ lost.T).T
        metric = torch.linalg.inv(torch.linalg.inv(h[k:, k:])[:dim, :dim])
        for row in range(10):
            book = books[k // at.width, row // at.height]
            away = best[row, :dim] - book
            distance = (away @ metric * away).sum(1)
            assert torch.allclose(book[ids[k // dim, row]], qo[row, k : k + dim], atol=1e-6)
            wrong += float(distance[ids[k // dim, row]]) > float(distance.min()) * 1.001 + 1e-9
    assert wrong == 0


@pytest.mark.parametrize("settings", [{"dim": 1}, {"dim": 2}, {"dim": 4}, {"scale_block": 8}, {"dim": 1, "codebook": "svd"}])
def test_the_update_lowers_the_error_it_minimises(settings: dict) -> None:
    w, x = layer(64, 96)
    found = {}
    for update in (False, True):
        m = tersor.quantizer("gptvq", update=update, **({"codebook": "float16"} | settings))
        found[update] = loss(w, m.dequantize(m.quantize(w, x)), x)
    assert found[True] < found[False]


def test_the_update_is_near_the_optimum_for_its_assignments() -> None:
    """Against the exact least squares over all codebooks, for the same codes."""
    w, x = layer(24, 32)
    found = {}
    for update in (False, True):
        m = tersor.quantizer("gptvq", codebook="float16", overhead=1.0, update=update, act_order=False)
        codes = m.quantize(w, x)
        found[update] = codes.parts["codes"], m.dequantize(codes).double()
    assert bytes(found[False][0].numpy()) == bytes(found[True][0].numpy())
    h = (x.T @ x).double()
    h += 0.01 * h.diagonal().mean() * torch.eye(32)
    at = m._layout(24, 32)
    ids = unpack(torch.as_tensor(found[True][0]), 4, 16 * 24).view(-1, 24).long()
    index = m._index(ids.view(-1, at.groups, at.height), at, (at.blocks, at.groups, 16, 2))
    root = torch.linalg.cholesky(h).T
    design = torch.zeros(32, 24, at.blocks * at.groups * 32, dtype=torch.float64).scatter_(2, index[:, :, None], 1.0)
    tall, aim = torch.einsum("ij,jrk->irk", root, design).flatten(0, 1), (root @ w.double().T).reshape(-1, 1)
    best = float((aim - tall @ torch.linalg.pinv(tall) @ aim).square().sum())
    off, on = (float(((w - q) @ h * (w - q)).sum()) for _, q in found.values())
    assert best < 0.95 * off
    assert off - on > 0.8 * (off - best)


@pytest.mark.parametrize("dim", [1, 2, 4])
@pytest.mark.parametrize("codebook", ["int8", "float16", "svd"])
@pytest.mark.parametrize("overhead", [0.125, 0.5])
def test_codebooks_cost_what_they_may(dim: int, codebook: str, overhead: float) -> None:
    if codebook == "svd" and dim > 1:
        return
    w = torch.randn(384, 512, generator=torch.Generator().manual_seed(0))
    m = tersor.quantizer("gptvq", dim=dim, codebook=codebook, overhead=overhead, iterations=1, update=False)
    codes = m.quantize(w, Calibration(gram=torch.eye(512), count=1))
    assert 0.6 * overhead < codes.bits_per_element - 2 < overhead + 0.05  # with the order of the columns


def test_weights_that_a_codebook_holds_come_back_exactly() -> None:
    g = torch.Generator().manual_seed(1)
    words = torch.tensor([[0.5, -1.0], [2.0, 0.25], [-3.0, -1.5], [0.125, 4.0]])
    w = words[torch.randint(0, 4, (64, 16), generator=g)].view(64, 32)
    m = tersor.quantizer("gptvq", codebook="float16", overhead=4.0, act_order=False)
    x = torch.randn(100, 32, generator=g)
    assert torch.equal(m.dequantize(m.quantize(w, x)), w)


@pytest.mark.parametrize(("dim", "overhead"), [(2, 0.25), (4, 0.25)])
def test_less_output_error_than_gptq_at_no_more_bits(dim: int, overhead: float) -> None:
    w, x = layer(192, 256, 1500)
    gptq = tersor.quantizer("gptq", bits=2, group_size=64, clip=True)
    ours = tersor.quantizer("gptvq", dim=dim, overhead=overhead)
    a, b = ours.quantize(w, x[:1000]), gptq.quantize(w, x[:1000])
    assert a.bits_per_element < b.bits_per_element
    assert loss(w, ours.dequantize(a), x[1000:]) < 0.95 * loss(w, gptq.dequantize(b), x[1000:])


def test_block_scales_are_within_half_a_step_and_help_where_blocks_differ() -> None:
    w, x = layer(48, 64)
    w *= torch.logspace(-1.5, 0, 4).repeat_interleave(16)[
        torch.randperm(64, generator=torch.Generator().manual_seed(2)) // 16 * 16
    ]
    table = _fit_scales(w.T.contiguous(), 16)
    largest = w.T.reshape(4, 16, 48).abs().amax(1)
    away = (_scales_of(table) / largest).log().abs()
    assert bool((away <= table["ratio"].float().log()[:, None] * 0.5 + 5e-3).all())
    rows = torch.logspace(-3, 0, 48)[:, None]
    found = [
        loss(w * rows, m.dequantize(m.quantize(w * rows, x)) / 1.0, x)
        for m in (tersor.quantizer("gptvq", scale_block=16), tersor.quantizer("gptvq"))
    ]
    assert found[0] < found[1]


@given(st.integers(1, 9), st.integers(1, 20), st.sampled_from([1, 2, 4]), st.sampled_from([0, 4, 8]), st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_any_shape(rows: int, columns: int, dim: int, block: int, seed: int) -> None:
    w, x = layer(rows, columns, 40, seed)
    m = tersor.quantizer("gptvq", dim=dim, scale_block=block, bits=2, iterations=3, act_order=bool(seed % 2))
    back = m.dequantize(m.quantize(w, x).to_bytes())
    assert back.shape == w.shape
    assert bool(torch.isfinite(back).all())
    assert float((back - w).abs().max()) <= 2.5 * float(w.abs().max()) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1.0, 1e30])
def test_extreme_weights(dtype: torch.dtype, scale: float) -> None:
    if dtype == torch.float16 and not 1e-6 < scale < 1e4:
        return
    w, x = layer(8, 20)
    m = tersor.quantizer("gptvq", bits=4, overhead=8.0)
    w = (w * scale).to(dtype)
    back = m.dequantize(m.quantize(w, x))
    assert back.dtype == dtype
    assert float(((back.double() - w.double()) / scale).abs().max()) < 1.0
    assert torch.equal(m.dequantize(m.quantize(w * 0, x)), w * 0)


def test_poor_calibration_gives_finite_weights_or_an_error() -> None:
    w, x = layer(6, 20)
    m = tersor.quantizer("gptvq")
    for gram in (x[:1].T @ x[:1], torch.ones(20, 20), torch.diag(torch.arange(20.0)), 1e30 * (x.T @ x), 1e-30 * (x.T @ x)):
        assert bool(torch.isfinite(m.dequantize(m.quantize(w, Calibration(gram=gram, count=1)))).all())
    constant = torch.ones(6, 20) * torch.arange(6.0)[:, None]
    assert bool(torch.isfinite(m.dequantize(m.quantize(constant, x))).all())
    for wrong in (None, Calibration(), x[:, :5], x * 0, Calibration(gram=torch.eye(9)), Calibration(gram=1 - 3 * torch.eye(20))):
        with pytest.raises(tersor.CalibrationError):
            m.quantize(w, wrong)
    for value in (float("nan"), float("inf")):
        broken = w.clone()
        broken[0, 0] = value
        with pytest.raises(tersor.InputError):
            m.quantize(broken, x)


def test_inputs_and_their_gram_are_the_same_calibration() -> None:
    w, x = layer(8, 30)
    m = tersor.quantizer("gptvq")
    assert m.quantize(w, x).to_bytes() == m.quantize(w, Calibration(gram=x.T @ x, count=400)).to_bytes()


def test_wrong_settings() -> None:
    for wrong in (
        {"bits": 5}, {"bits": 3, "dim": 4}, {"dim": 3}, {"scale_block": 3}, {"codebook": "svd"}, {"codebook": "int4"},
        {"overhead": 0.0}, {"bits": 0, "dim": 1}, {"iterations": -1},
    ):  # fmt: skip
        with pytest.raises(tersor.ConfigError):
            tersor.quantizer("gptvq", **wrong)
    assert [str(m) for b in (2, 3, 8) for m in tersor.quantizer("gptvq").at_bits(b)] == [
        "gptvq", "gptvq:bits=3", "gptvq:bits=8,dim=1,overhead=1.0",
    ]  # fmt: skip


def test_conformance() -> None:
    assert_conforms("gptvq", max_examples=3, fresh_process=False)
