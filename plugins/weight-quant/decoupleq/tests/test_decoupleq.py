"""decoupleQ: floats against numpy's least squares on the layer's inputs, integers against all others on tiny weights."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor import Calibration
from tersor.testing import assert_conforms

torch.set_num_threads(1)


def layer(out: int, columns: int, samples: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns // 3 + 1, generator=g) @ torch.randn(columns // 3 + 1, columns, generator=g)
    x += 0.3 * torch.randn(samples, columns, generator=g)
    x[:, ::7] *= 4
    return torch.randn(out, columns, generator=g), x


def lost(w: torch.Tensor, q: torch.Tensor, x: torch.Tensor) -> float:
    return float((x.double() @ (w.double() - q.double()).T).square().sum())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(2, 30), st.integers(2, 12), st.integers(0, 99))
def test_scales_and_zeros_are_the_least_squares_solution(out: int, columns: int, size: int, seed: int) -> None:
    w, x = layer(out, columns, 4 * columns, seed)
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-2, 2, (out, columns), generator=g).float()
    place = torch.arange(columns) // size
    groups = int(place[-1]) + 1
    zeros = torch.zeros(groups, out)
    s, z = tersor.quantizer("decoupleq")._floats(zeros, zeros, q.T.contiguous(), w.T.contiguous(), x.T @ x, place)
    member = torch.nn.functional.one_hot(place, groups).double()
    for row in range(out):
        design = torch.cat([member * q[row, :, None], member], 1)
        found = design @ torch.cat([s[:, row], z[:, row]]).double()
        best = design @ torch.from_numpy(np.linalg.lstsq((x.double() @ design).numpy(), (x @ w[row]).double().numpy())[0])
        size_of = float((x @ w[row]).square().sum())
        assert lost(w[row : row + 1], found[None], x) <= lost(w[row : row + 1], best[None], x) + 1e-4 * size_of


@pytest.mark.parametrize("descent", [0, 1])
def test_between_the_best_of_all_codes_and_rounding(descent: int) -> None:
    """All 4^5 codes of rows of five weights, each with its least squares scale and zero."""
    every = torch.tensor(list(itertools.product(range(4), repeat=5))).double()
    ratios = []
    for seed in range(40):
        w, x = layer(1, 5, 30, seed)
        design = x.double() @ torch.stack([every, torch.ones_like(every)], 2)  # codes x samples x 2
        target = (x @ w[0]).double()
        found = torch.linalg.lstsq(design, target.expand(len(every), -1)[..., None], driver="gelsd").solution
        best = float((target - (design @ found)[..., 0]).square().sum(1).min())
        method = tersor.quantizer("decoupleq", group_size=-1, damp=0.0, descent=descent, iterations=6)
        ours = lost(w, method.dequantize(method.quantize(w, x)), x)
        rtn = tersor.quantizer("rtn", bits=2, group_size=-1, clip=True)
        assert ours >= best * 0.999  # nothing is lost in the measure
        ratios.append((ours / best, lost(w, rtn.dequantize(rtn.quantize(w, x)), x) / best))
    median = torch.tensor(ratios).median(0).values
    assert float(median[0]) < 0.25 * float(median[1]), median


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("size", [-1, 16])
def test_the_error_never_rises(clip: bool, size: int) -> None:
    w, x = layer(24, 70)
    gram = x.T @ x
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(70)
    errors = []
    for iterations in (1, 2, 3, 6):
        method = tersor.quantizer("decoupleq", group_size=size, iterations=iterations, clip=clip)
        e = (w - method.dequantize(method.quantize(w, x))).double()
        errors.append(((e @ damped.double()) * e).sum(1))
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before * 1.001).all())
    assert float(errors[-1].sum()) < float(errors[0].sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [-1, 48])
def test_less_output_error_than_gptq_and_rounding(bits: int, size: int) -> None:
    w, x = layer(48, 144, 600)
    ours, gptq, rtn = (
        lost(w, q.dequantize(q.quantize(w, x[:300])), x[300:])
        for q in (
            tersor.quantizer("decoupleq", bits=bits, group_size=size),
            tersor.quantizer("gptq", bits=bits, group_size=size),
            tersor.quantizer("rtn", bits=bits, group_size=size, clip=True),
        )
    )
    assert ours < gptq
    assert ours < 0.5 * rtn


def test_descent_repairs_the_ignored_box() -> None:
    w, x = layer(48, 144, 600)
    methods = [tersor.quantizer("decoupleq", group_size=48, descent=n) for n in (0, 1, 3)]
    errors = [lost(w, m.dequantize(m.quantize(w, x)), x) for m in methods]
    assert errors[2] < errors[1] < 0.97 * errors[0]


def test_size_of_the_file() -> None:
    w, x = layer(64, 576, 100)
    for bits in (2, 3):
        payload = 64 * 576 * bits // 8 + 64 * 5 * 2 * 2
        assert payload <= tersor.quantizer("decoupleq", bits=bits).quantize(w, x).nbytes <= payload + 400


def test_inputs_and_their_gram_are_the_same_calibration() -> None:
    w, x = layer(8, 30)
    method = tersor.quantizer("decoupleq", group_size=8)
    one = method.quantize(w, x).to_bytes()
    assert one == method.quantize(w, Calibration(gram=x.T @ x, count=200)).to_bytes()


def test_levels_for_engines_are_the_values() -> None:
    w, x = layer(8, 30)
    for kw in ({}, {"group_size": 8, "bits": 4}, {"group_size": -1}):
        method = tersor.quantizer("decoupleq", **kw)
        codes = method.quantize(w, x)
        assert torch.allclose(method.uniform(codes).dense(), method.dequantize(codes), atol=1e-5), kw


def test_constant_rows_singular_calibration_and_one_row() -> None:
    w, x = layer(6, 20)
    method = tersor.quantizer("decoupleq", group_size=8)
    dead = x.clone()
    dead[:, [3, 11]] = 0
    for seen in (x[:1], dead, torch.ones(5, 20)):
        assert bool(torch.isfinite(method.dequantize(method.quantize(w, seen))).all())
        assert bool(torch.isfinite(method.dequantize(method.quantize(w[:1], seen))).all())
    flat = torch.tensor([[2.5], [-1.0], [0.0]]).expand(3, 20)
    assert torch.allclose(method.dequantize(method.quantize(flat, x)), flat, rtol=2e-3)


def test_extreme_weights() -> None:
    w, x = layer(6, 20)
    method = tersor.quantizer("decoupleq", bits=8, group_size=8)
    for scale in (1e-30, 1e-6, 1e30):
        back = method.dequantize(method.quantize(w * scale, x))
        assert lost(w, back / scale, x) < 1e-3 * float((x @ w.T).square().sum())


def test_wrong_settings_inputs_calibration_and_parts() -> None:
    w, x = layer(4, 10)
    for wrong in (
        {"bits": 1},
        {"bits": 9},
        {"group_size": 0},
        {"group_size": -2},
        {"iterations": 0},
        {"descent": -1},
        {"damp": 2.0},
    ):
        with pytest.raises(tersor.ConfigError):
            tersor.quantizer("decoupleq", **wrong)
    method = tersor.quantizer("decoupleq")
    broken = w.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(tersor.InputError):
        method.quantize(broken, x)
    for missing in (
        None,
        Calibration(),
        x[:, :5],
        x * 0,
        Calibration(gram=torch.eye(9)),
        Calibration(gram=1 - 3 * torch.eye(10)),
    ):
        with pytest.raises(tersor.CalibrationError):
            method.quantize(w, missing)
    codes = method.quantize(w, x)
    for name, part in (
        ("scale", codes.parts["scale"].float()),
        ("zero", codes.parts["zero"] * torch.nan),
        ("codes", codes.parts["codes"][:-1]),
    ):
        spoiled = method.quantize(w, x)
        spoiled.parts[name] = part
        with pytest.raises(tersor.CorruptPayloadError):
            method.dequantize(spoiled)


def test_conformance() -> None:
    assert_conforms("decoupleq", max_examples=3, fresh_process=False)
