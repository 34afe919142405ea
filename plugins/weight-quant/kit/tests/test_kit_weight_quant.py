"""Bit packing, grids and error feedback against plain definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor import Calibration, CalibrationError
from tersor_kit_weight_quant import (
    CLIP_RATIOS,
    feedback,
    fit_grid,
    gram,
    group_count,
    load,
    pack,
    packed_size,
    store,
    unit_factor,
)
from tersor_kit_weight_quant import unpack as unpack_codes
from tersor_kit_weight_quant.grid import Grid

torch.set_num_threads(1)
QUICK = settings(max_examples=40, deadline=None)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@QUICK
@given(bits=st.integers(1, 8), count=st.integers(0, 70), seed=st.integers(0, 99))
def test_packing_is_a_dense_stream_least_significant_bit_first(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    number = sum(int(c) << (bits * i) for i, c in enumerate(codes))
    assert bytes(packed.tolist()) == number.to_bytes(packed_size(count, bits), "little")
    assert torch.equal(unpack_codes(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_of_a_large_non_contiguous_tensor(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (301, 203), dtype=torch.uint8).T
    packed = pack(codes, bits)
    assert packed.numel() == packed_size(codes.numel(), bits)
    assert torch.equal(unpack_codes(packed, bits, codes.numel()).view(203, 301), codes)


def test_packing_refuses_what_it_cannot_hold() -> None:
    codes = torch.zeros(9, dtype=torch.uint8)
    for bits in (0, 9):
        with pytest.raises(ValueError, match="1 to 8"):
            pack(codes, bits)
    with pytest.raises(TypeError, match="uint8"):
        pack(codes.int(), 4)
    with pytest.raises(ValueError, match="5 bytes"):
        unpack_codes(torch.zeros(4, dtype=torch.uint8), 4, 9)


@QUICK
@given(
    bits=st.integers(2, 8), rows=st.integers(1, 5), columns=st.integers(1, 23), size=st.sampled_from([-1, 1, 4, 7, 64]),
    sym=st.booleans(), clip=st.booleans(), power=st.integers(-30, 30), offset=st.sampled_from([0.0, 3.0, -3.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), seed=st.integers(0, 9),
)  # fmt: skip
def test_codes_to_values_to_codes_is_exact(bits, rows, columns, size, sym, clip, power, offset, dtype, seed) -> None:
    if dtype == torch.float16:
        power = max(min(power, 4), -3)
    weight = ((rand(rows, columns, seed=seed) + offset) * 10.0**power).to(dtype)
    grid = fit_grid(weight, bits, size, sym, CLIP_RATIOS if clip else ())
    codes = grid.quantize(weight)
    values = grid.dequantize(codes, dtype)
    assert values.dtype == dtype
    assert bool(torch.isfinite(values).all())
    again = grid.quantize(values)
    scale = grid.scale.repeat_interleave(grid.group_size, 1)[:, :columns]
    normal = scale > 6.2e-5  # where the type of the values can hold them: float16 values of subnormal scale cannot
    assert torch.equal(again[normal], codes[normal])
    if dtype == torch.float32:
        assert torch.equal(again, codes)
    if not clip:
        reach = max(float(weight.max()), 0.0) - min(float(weight.min()), 0.0)
        reach = 2 * float(weight.abs().max()) if sym else reach
        assert float((values.double() - weight.double()).abs().max()) <= reach * (0.63 / (2**bits - 1) + torch.finfo(dtype).eps)


@QUICK
@given(bits=st.integers(2, 8), columns=st.integers(1, 23), size=st.sampled_from([-1, 4, 7]), sym=st.booleans())
def test_every_code_survives(bits: int, columns: int, size: int, sym: bool) -> None:
    grid = fit_grid(rand(3, columns), bits, size, sym)
    codes = torch.randint(0, 2**bits, (3, columns), dtype=torch.uint8)
    assert torch.equal(grid.quantize(grid.dequantize(codes)), codes)


def test_grid_of_zeros_constants_and_extremes() -> None:
    weight = torch.zeros(4, 8)
    weight[1], weight[2], weight[3, 0] = 2.5, -1e-30, 1e30
    values = (grid := fit_grid(weight, 4, 4, False)).dequantize(grid.quantize(weight))
    assert torch.equal(values[0], torch.zeros(8))
    assert abs(float(values[3, 0]) / 1e30 - 1) < 1e-3
    for constant in (1e-30, -2.5, 3e38, 1.0):
        weight = torch.full((2, 8), constant)
        grid = fit_grid(weight, 4, 4, False)
        assert float((grid.dequantize(grid.quantize(weight)) / constant - 1).abs().max()) < 1e-3


def test_grid_where_nothing_needs_the_exponent_stores_none() -> None:
    grid = fit_grid(0.05 * rand(8, 40), 4, 16, False)
    assert grid.exponent == 0
    assert "exponent" not in store(grid, grid.quantize(rand(8, 40)))


def test_sizes_and_the_ragged_group() -> None:
    weight = rand(6, 576)
    grid = fit_grid(weight, 3, 128, False)
    parts = store(grid, grid.quantize(weight))
    assert group_count(576, 128) == 5
    assert grid.scale.shape == (6, 5)
    assert parts["codes"].numel() == 6 * 576 * 3 // 8
    assert parts["zero"].numel() == packed_size(30, 3)
    tail = fit_grid(weight[:, 512:], 3, 64, False)
    assert torch.equal(grid.scale[:, 4:], tail.scale)
    assert torch.equal(grid.dequantize(grid.quantize(weight))[:, 512:], tail.dequantize(tail.quantize(weight[:, 512:])))


def test_clip_search_never_adds_error_to_a_group() -> None:
    weight = rand(16, 128)
    plain, clipped = fit_grid(weight, 3, 32, False), fit_grid(weight, 3, 32, False, CLIP_RATIOS)
    errors = [(g.dequantize(g.quantize(weight)) - weight).square().unflatten(1, (4, 32)).sum(2) for g in (plain, clipped)]
    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())
    assert float(errors[1].sum()) < 0.9 * float(errors[0].sum())


@pytest.mark.parametrize("groups", [1, 2, 5, 300])
def test_store_and_load_with_group_indices(groups: int) -> None:
    index = torch.randint(0, groups, (2 * groups,))
    grid = Grid(torch.rand(3, groups).half(), torch.randint(0, 16, (3, groups), dtype=torch.uint8), 4, 2, index)
    codes = torch.randint(0, 16, (3, 2 * groups), dtype=torch.uint8)
    back, same = load(store(grid, codes), (3, 2 * groups), 4, 2, False, indexed=True)
    assert torch.equal(same, codes)
    assert torch.equal(back.index, index)
    expected = (codes.float() - grid.zero[:, index].float()) * grid.scale.float()[:, index]
    assert torch.equal(back.dequantize(codes), expected)


def test_load_refuses_parts_that_do_not_fit() -> None:
    weight = rand(4, 10)
    grid = fit_grid(weight, 3, 4, False)
    good = store(grid, grid.quantize(weight))
    wrong = {
        "codes": [good["codes"][:-1], good["codes"].int()],
        "scale": [good["scale"][:, :2], good["scale"].float(), good["scale"] * float("nan"), -good["scale"]],
        "zero": [good["zero"][:-1]],
        "exponent": [10**6, 0.5, True],
    }
    for key, values in wrong.items():
        for value in values:
            with pytest.raises((ValueError, TypeError)):
                load({**good, key: value}, (4, 10), 3, 4, False)
    with pytest.raises(ValueError, match="index"):
        load({**good, "index": pack(torch.full((10,), 3, dtype=torch.uint8), 2)}, (4, 10), 3, 4, False, indexed=True)


def spd(n: int, seed: int = 0) -> torch.Tensor:
    x = rand(4 * n, n // 2, seed=seed) @ rand(n // 2, n, seed=seed + 1) + 0.3 * rand(4 * n, n, seed=seed + 2)
    return x.T @ x


def test_unit_factor_factorises_the_ordered_damped_matrix() -> None:
    h, order = spd(12), torch.randperm(12)
    before = h.clone()
    a = unit_factor(h, order, 0.05).double()
    assert torch.equal(h, before)
    damped = h[order][:, order].double() + 0.05 * h.diagonal().mean() * torch.eye(12)
    inner = torch.linalg.solve(a, damped) @ torch.linalg.inv(a).T
    assert torch.equal(a.triu(), a)
    assert torch.equal(a.diagonal(), torch.ones(12).double())
    assert float((inner - inner.diagonal().diag()).abs().max()) < 1e-4 * float(damped.max())


def test_damping_is_raised_where_it_must_be_and_refused_at_last() -> None:
    x = rand(3, 8)
    with pytest.warns(UserWarning, match="singular"):
        unit_factor(x.T @ x - 1e-3 * torch.eye(8), None, 0.0)
    with pytest.raises(CalibrationError, match="not positive definite"), pytest.warns(UserWarning, match="singular"):
        unit_factor(torch.tensor([[1.0, 5.0], [5.0, 1.0]]))
    with pytest.raises(CalibrationError, match="zero"):
        unit_factor(torch.zeros(3, 3))


@pytest.mark.parametrize(("n", "span"), [(1, 1), (7, 3), (40, 8), (33, 64), (40, 40)])
def test_feedback_does_not_depend_on_its_blocking_and_enters_each_group_once(n: int, span: int) -> None:
    factor, columns = unit_factor(spd(max(n, 2))[:n, :n]), rand(n, 5)
    runs = []
    for leaf in (1, 3, 32):
        entered, order = [], []

        def round_(k: int, w: torch.Tensor, error: torch.Tensor, order: list = order) -> None:
            order.append(k)
            error -= w.round_()

        work = columns.clone()
        error = feedback(work, factor, span, lambda s, g, entered=entered: entered.append((s, len(g))), round_, leaf)
        assert order == list(range(n))
        assert entered == [(s, min(span, n - s)) for s in range(0, n, span)]
        assert torch.allclose(columns - error, work, atol=1e-5)
        runs.append(work)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_gram_checks_the_calibration() -> None:
    x = rand(6, 4)
    assert torch.allclose(gram(Calibration(inputs=x.view(2, 3, 4)), 4), x.T @ x)
    assert torch.equal(gram(Calibration(gram=torch.eye(4)), 4), torch.eye(4))
    for wrong in (
        None, Calibration(), Calibration(inputs=x[:, :3]), Calibration(inputs=x[:0]), Calibration(gram=torch.eye(5)),
        Calibration(inputs=x * float("nan")), Calibration(inputs=x * 1e30), Calibration(gram=-torch.eye(4)),
    ):  # fmt: skip
        with pytest.raises(CalibrationError):
            gram(wrong, 4)
