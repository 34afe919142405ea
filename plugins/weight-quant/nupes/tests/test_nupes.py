"""NUPES: levels, search and learning against their definitions in float64 and plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor import Calibration
from tersor.testing import assert_conforms
from tersor_nupes import nupes as code

torch.set_num_threads(1)


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def layer(out: int, columns: int, samples: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns // 3 + 1, generator=g) @ torch.randn(columns // 3 + 1, columns, generator=g)
    x += 0.3 * torch.randn(samples, columns, generator=g)
    return torch.randn(out, columns, generator=g), x


def output_error(method: tersor.Quantizer, w: torch.Tensor, x: torch.Tensor, calibration: torch.Tensor | None) -> float:
    back = method.dequantize(method.quantize(w, calibration))
    return float((x @ (w - back).T).square().sum() / (x @ w.T).square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("power", [200, 557, 1000, 2000])
def test_levels_are_the_powers_of_the_codes(bits: int, power: int) -> None:
    half = 2 ** (bits - 1)
    expected = [math.copysign(abs(c / half) ** (1000 / power), c) for c in range(-half, half)]
    assert torch.allclose(code.level_table(bits, power).double(), torch.tensor(expected).double(), rtol=1e-6, atol=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(2, 6), st.integers(0, 99), st.sampled_from([-1, 1, 7, 16]))
def test_every_weight_goes_to_its_nearest_level(rows: int, columns: int, bits: int, seed: int, size: int) -> None:
    w = normal(rows, columns, seed)
    method = tersor.quantizer("nupes", bits=bits, group_size=size)
    codes = method.quantize(w)
    levels = code.level_table(bits, codes.meta["power"])
    scale = codes.parts["scale"].float()
    expected = torch.empty_like(w)
    for i in range(rows):
        for j in range(columns):
            options = levels * scale[i, 0 if size == -1 else j // size]
            expected[i, j] = options[(options - w[i, j]).abs().argmin()]
    back = method.dequantize(codes)
    assert torch.allclose((back - w).abs(), (expected - w).abs(), atol=1e-6)
    for i in range(rows):  # the extreme weight of a group is a level, up to the rounding of the scale
        group = w[i] if size == -1 else w[i, :size]
        k = int(group.abs().argmax())
        assert abs(float(back[i, k] - group[k])) <= 1e-3 * abs(float(group[k]))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_exponent_leaves_the_least_error_of_all(bits: int) -> None:
    w = normal(48, 96)
    method = tersor.quantizer("nupes", bits=bits, group_size=32)
    codes = method.quantize(w)
    wide = codes.parts["scale"].float().repeat_interleave(32, 1)
    errors = {}
    for power in range(300, 1501, 10):
        options = code.level_table(bits, power)[:, None, None] * wide
        errors[power] = float((options - w).square().amin(0).sum())
    found = float((method.dequantize(codes) - w).square().sum())
    assert found <= 1.002 * min(errors.values())
    assert found < 0.95 * errors[1000]  # weights are normal, levels not uniform


def test_uniform_weights_get_nearly_uniform_levels() -> None:
    w = torch.rand(64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert abs(tersor.quantizer("nupes").quantize(w).meta["power"] - 1000) < 150


def test_less_error_than_rounding_on_an_even_grid() -> None:
    w = normal(64, 384)
    for bits in (3, 4):
        for clip in (False, True):
            ours, rtn = (tersor.quantizer(n, bits=bits, clip=clip) for n in ("nupes", "rtn"))
            error = [float((q.dequantize(q.quantize(w)) - w).square().sum()) for q in (ours, rtn)]
            size = [q.quantize(w).nbytes for q in (ours, rtn)]
            assert error[0] < error[1]
            assert size[0] < size[1]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_learning_lowers_the_output_error(bits: int) -> None:
    w, x = layer(48, 144, 600)
    free, learned = (tersor.quantizer("nupes", bits=bits, group_size=32, steps=n) for n in (0, 30))
    errors = [output_error(q, w, x[300:], x[:300]) for q in (free, learned)]
    assert errors[1] < 0.5 * errors[0]
    soft = tersor.quantizer("nupes", bits=bits, group_size=32, sweeps=0)
    assert output_error(soft, w, x[300:], x[:300]) < 0.6 * errors[0]


def test_learning_moves_codes_by_more_than_one_and_the_exponent_too() -> None:
    farthest, powers = 0, []
    for seed in range(4):
        w, x = layer(24, 48, 300, seed)
        free, learned = (tersor.quantizer("nupes", group_size=16, steps=n, sweeps=0, rate=0.5).quantize(w, x) for n in (0, 30))
        codes = [code.unpack(c.parts["codes"], 4, w.numel()).int() for c in (free, learned)]
        farthest = max(farthest, int((codes[0] - codes[1]).abs().max()))
        powers.append(abs(free.meta["power"] - learned.meta["power"]))
    assert farthest > 1
    assert max(powers) >= 3


def test_a_sweep_ends_where_no_single_code_can_be_better() -> None:
    w, x = layer(5, 12, 40)
    method = tersor.quantizer("nupes", bits=3, group_size=4, sweeps=30, damp=0.0)
    codes = method.quantize(w, x)
    gram = (x.T @ x).double()
    levels = code.level_table(3, codes.meta["power"])
    wide = codes.parts["scale"].float().repeat_interleave(4, 1)
    back = method.dequantize(codes)

    def loss(q: torch.Tensor) -> float:
        e = q.double() - w.double()
        return float(((e @ gram) * e).sum())

    best = loss(back)
    for i in range(5):
        for j in range(12):
            for level in levels:
                other = back.clone()
                other[i, j] = level * wide[i, j]
                assert loss(other) >= best * (1 - 1e-4)


def test_the_derivative_by_the_exponent() -> None:
    for power in (400, 900):
        a, h = power / 1000, 1e-4
        levels = code.level_table(4, power).double()
        size = torch.arange(-8, 8).double() / 8
        up, down = (size.sign() * size.abs() ** (1 / (a * math.exp(s))) for s in (h, -h))
        assert torch.allclose(-torch.xlogy(levels, levels.abs()), (up - down) / (2 * h), atol=1e-5)


def test_the_transition_is_soft_and_its_slope_is_the_derivative() -> None:
    x = torch.linspace(0, 1, 101)
    for steep in (code.SOFT, code.HARD):
        value, slope = code._transition(x.clone(), steep)
        assert abs(float(value[0])) < 1e-6
        assert abs(float(value[-1]) - 1) < 1e-6
        assert torch.allclose((value[2:] - value[:-2]) / 0.02, slope[1:-1], atol=0.03 * steep)


def test_inputs_and_their_gram_are_the_same_calibration_and_no_steps_are_no_calibration() -> None:
    w, x = layer(8, 30)
    method = tersor.quantizer("nupes", group_size=8)
    assert method.quantize(w, x).to_bytes() == method.quantize(w, Calibration(gram=x.T @ x, count=200)).to_bytes()
    free = tersor.quantizer("nupes", group_size=8, steps=0)
    assert free.quantize(w, x).to_bytes() == free.quantize(w).to_bytes()


def test_zero_weights_constant_rows_far_sizes_and_singular_data() -> None:
    method = tersor.quantizer("nupes", bits=4, group_size=8)
    one = torch.ones(1, 20)
    for w in (torch.zeros(3, 20), torch.full((3, 20), -2.0), normal(1, 20), normal(6, 20) * 1e-30, normal(6, 20) * 1e30):
        for calibration in (
            None,
            Calibration(gram=one.T @ one, count=1),
            Calibration(gram=torch.diag(one[0].cumsum(0) > 15) * 1.0),
        ):
            back = method.dequantize(method.quantize(w, calibration))
            assert bool(torch.isfinite(back).all())
            if calibration is None:
                assert float((back - w).abs().max()) <= 0.3 * float(w.abs().max())
    for dtype in (torch.float16, torch.bfloat16):
        back = method.dequantize(method.quantize((normal(4, 20) * 6e4).clamp(-6e4, 6e4).to(dtype), normal(9, 20)))
        assert back.dtype == dtype
        assert bool(torch.isfinite(back).all())
    assert method.quantize(normal(20, 1), normal(5, 1)).nbytes > 0


def test_wrong_settings_inputs_calibration_and_files() -> None:
    w, x = layer(4, 10)
    for wrong in ({"bits": 1}, {"bits": 9}, {"group_size": 0}, {"group_size": -2}, {"steps": -1}, {"rate": 2.0}, {"damp": -0.1}):
        with pytest.raises(tersor.ConfigError):
            tersor.quantizer("nupes", **wrong)
    method = tersor.quantizer("nupes")
    with pytest.raises(tersor.InputError):
        method.quantize(w * float("nan"))
    for wrong in (x[:, :5], x * 0, Calibration(gram=torch.eye(9)), Calibration(gram=-torch.eye(10))):
        with pytest.raises(tersor.CalibrationError):
            method.quantize(w, wrong)
    codes = method.quantize(w)
    for key, wrong in (("power", 0), ("power", 10**9), ("power", 5.5), ("power", "a"), ("exponent", 1000)):
        broken = tersor.Codes(method, codes.spec, codes.parts, {**codes.meta, key: wrong})
        with pytest.raises(tersor.CorruptPayloadError):
            method.dequantize(broken.to_bytes())


def test_conformance() -> None:
    assert_conforms("nupes", max_examples=3, fresh_process=False)
