"""VPTQ against its algorithm, step by step in float64, and against what its parts promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor import Calibration
from tersor.testing import assert_conforms
from tersor_kit_weight_quant import unpack_wide

torch.set_num_threads(1)


def layer(out: int, columns: int, samples: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns // 3 + 1, generator=g) @ torch.randn(columns // 3 + 1, columns, generator=g)
    x += 0.3 * torch.randn(samples, columns, generator=g)
    x[:, ::7] *= 4
    return torch.randn(out, columns, generator=g), x


def loss(w: torch.Tensor, q: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (w - q).T).double().square().sum() / (x @ w.T).double().square().sum())


@pytest.mark.parametrize("residual", [0, 2])
@pytest.mark.parametrize("outliers", [0.0, 0.2])
def test_assignments_are_those_of_the_algorithm(residual: int, outliers: float) -> None:
    """With the file's codebooks: every column at its best values given the rounded ones, its vectors to their nearest entries."""
    w, x = layer(12, 20)
    m = tersor.quantizer("vptq", bits=2, vector=3, residual=residual, outliers=outliers, outlier_bits=2, update=False)
    codes = m.quantize(w, x)
    q = m.dequantize(codes).double()
    h = (x.T @ x).double()
    order = h.diagonal().argsort(descending=True, stable=True)
    h = (h + 0.01 * h.diagonal().mean() * torch.eye(20))[order][:, order]
    wo, qo = w.double()[:, order], q[:, order]
    unit = 2.0 ** codes.meta["exponent"]
    first = 4 if outliers else 0
    ids = unpack_wide(torch.as_tensor(codes.parts["codes"]), 6 - residual, (20 - first) * 4).view(20 - first, 4)
    wrong = 0
    for k in range(20):
        lost = (wo - qo)[:, :k]
        best = (wo[:, k:] + torch.linalg.solve(h[k:, k:], h[k:, :k] @ lost.T).T)[:, 0]
        vectors, got = (best.view(-1, 2), qo[:, k].view(-1, 2)) if k < first else (best.view(-1, 3), qo[:, k].view(-1, 3))
        book = codes.parts["outlier_book" if k < first else "book"].double() * unit
        if k >= first and residual:
            second = codes.parts["residual_book"].double() * unit
            main = book[ids[k - first]]
            wrong += int((torch.cdist(vectors, book).amin(1) < (vectors - main).norm(dim=1) * 0.999).sum())
            vectors, got, book = vectors - main, got - main, second
        wrong += int((torch.cdist(vectors, book).amin(1) < (vectors - got).norm(dim=1) * 0.999 - 1e-5).sum())
    assert wrong == 0


@pytest.mark.parametrize("settings", [{}, {"bits": 3, "residual": 4}, {"outliers": 0.1}, {"norm": "column"}])
def test_the_update_lowers_the_error_it_minimises(settings: dict) -> None:
    w, x = layer(64, 96)
    found = {}
    for update in (False, True):
        m = tersor.quantizer("vptq", update=update, **settings)
        found[update] = loss(w, m.dequantize(m.quantize(w, x)), x)
    assert found[True] < found[False]


def test_a_residual_stage_and_outlier_columns_lower_the_error() -> None:
    w, x = layer(128, 160, 800)
    found = [
        loss(w, m.dequantize(m.quantize(w, x)), x)
        for m in (
            tersor.quantizer("vptq", bits=3, residual=4, outliers=0.0),
            tersor.quantizer("vptq", outliers=0.1),
            tersor.quantizer("vptq", outliers=0.0),
        )
    ]
    assert found[0] < 0.7 * found[2]
    assert found[1] < found[2]


def test_weights_that_the_codebook_holds_come_back_exactly() -> None:
    g = torch.Generator().manual_seed(1)
    words = torch.tensor([[0.5, -1.0], [2.0, 0.25], [-3.0, -1.5], [0.125, 4.0]])
    w = words[torch.randint(0, 4, (32, 16), generator=g)].view(32, 16, 2).transpose(1, 2).reshape(64, 16)
    m = tersor.quantizer("vptq", vector=2, outliers=0.0)
    assert torch.equal(m.dequantize(m.quantize(w, torch.randn(100, 16, generator=g))), w)


@pytest.mark.parametrize("residual", [0, 4])
def test_size_is_indices_codebooks_and_order(residual: int) -> None:
    w = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    m = tersor.quantizer("vptq", bits=3, residual=residual, vector=3 if not residual else 4, iterations=1, update=False)
    codes = m.quantize(w, Calibration(gram=torch.eye(256), count=1))
    vector, main = m.vector, 3 * m.vector - residual
    books = 2 * (vector << main) + (2 * (vector << residual) if residual else 0) + 2 * (2 << 8)
    indices = 3 * -(-128 // vector) * vector * 253 // 8 + 4 * 128 * 3 // 8
    assert 0 <= codes.nbytes - books - indices - 256 < 400


def test_less_output_error_than_gptq_at_no_more_bits() -> None:
    w, x = layer(512, 256, 1500)
    gptq, ours = tersor.quantizer("gptq", bits=2, group_size=64, clip=True), tersor.quantizer("vptq")
    a, b = ours.quantize(w, x[:1000]), gptq.quantize(w, x[:1000])
    assert a.bits_per_element < b.bits_per_element
    assert loss(w, ours.dequantize(a), x[1000:]) < 0.9 * loss(w, gptq.dequantize(b), x[1000:])


@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 5), st.sampled_from([0, 1]), st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_any_shape(rows: int, columns: int, vector: int, residual: int, seed: int) -> None:
    w, x = layer(rows, columns, 40, seed)
    norm = ("none", "column")[seed % 2]
    m = tersor.quantizer("vptq", vector=vector, residual=residual, norm=norm, iterations=3, outliers=seed / 9, outlier_bits=2)
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
    m = tersor.quantizer("vptq", bits=4, vector=2)
    w = (w * scale).to(dtype)
    back = m.dequantize(m.quantize(w, x))
    assert back.dtype == dtype
    assert float(((back.double() - w.double()) / scale).abs().max()) < 1.0
    assert torch.equal(m.dequantize(m.quantize(w * 0, x)), w * 0)


def test_poor_calibration_gives_finite_weights_or_an_error() -> None:
    w, x = layer(6, 20)
    m = tersor.quantizer("vptq", vector=2)
    for gram in (x[:1].T @ x[:1], torch.ones(20, 20), torch.diag(torch.arange(20.0)), 1e30 * (x.T @ x), 1e-30 * (x.T @ x)):
        assert bool(torch.isfinite(m.dequantize(m.quantize(w, Calibration(gram=gram, count=1)))).all())
    constant = torch.ones(6, 20) * torch.arange(6.0)[:, None]
    for norm in ("none", "column"):
        own = tersor.quantizer("vptq", vector=2, norm=norm)
        for x_ in (constant, constant.T[:6, :6]):
            back = own.dequantize(own.quantize(x_, x[:, : x_.shape[1]]))
            assert bool(torch.isfinite(back).all())
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
    m = tersor.quantizer("vptq")
    assert m.quantize(w, x).to_bytes() == m.quantize(w, Calibration(gram=x.T @ x, count=400)).to_bytes()


def test_wrong_settings() -> None:
    for wrong in (
        {"bits": 4}, {"bits": 2, "residual": 8}, {"bits": 0}, {"vector": 0}, {"vector": 17}, {"residual": -1}, {"norm": "row"},
        {"outliers": 1.5}, {"outlier_bits": 8}, {"bits": 8, "vector": 4, "residual": 17},
    ):  # fmt: skip
        with pytest.raises(tersor.ConfigError):
            tersor.quantizer("vptq", **wrong)
    for bits in (2, 3, 4, 8):
        assert all(m.bits == bits for m in tersor.quantizer("vptq").at_bits(bits))


def test_conformance() -> None:
    assert_conforms("vptq", max_examples=3, fresh_process=False)
