"""FineQuant: the heuristic against its definition in plain Python, and the files it makes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor.testing import assert_conforms

torch.set_num_threads(1)


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def steps(w: torch.Tensor, size: int, bits: int, sym: bool) -> list[float]:
    """The step of every group, group by group."""
    found = []
    for row in w.double():
        for group in row.split(size):
            low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
            reach = 2 * max(-low, high) if sym else high - low
            found.append(reach / (2**bits - 1))
    return found


def chosen(w: torch.Tensor, bits: int, alpha: float, smallest: int, sym: bool) -> int:
    """The heuristic, written out."""
    size = w.shape[1]
    while size > 1:
        half = -(-size // 2)
        if half < smallest:
            break
        coarse, fine = (sum(s) / len(s) for s in (steps(w, size, bits, sym), steps(w, half, bits, sym)))
        if (coarse - fine) / coarse <= alpha:
            break
        size = half
    return size


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 90), st.integers(0, 99), st.sampled_from([0.0, 0.05, 0.11]), st.booleans())
def test_the_heuristic_is_its_definition(rows: int, columns: int, seed: int, alpha: float, sym: bool) -> None:
    w = normal(rows, columns, seed)
    if seed % 3 == 0:
        w[:, seed % columns] *= 8
    method = tersor.quantizer("finequant", alpha=alpha, smallest=4, sym=sym)
    codes = method.quantize(w)
    assert codes.meta["group_size"] == method.granularity(w)
    shrinks = []
    size = columns
    while size > 1:
        half = -(-size // 2)
        coarse, fine = (sum(s) / len(s) for s in (steps(w, size, 4, sym), steps(w, half, 4, sym)))
        shrinks.append(abs((coarse - fine) / coarse - alpha))
        size = half
    if all(s > 1e-3 for s in shrinks):  # within float16's rounding of alpha it may fall either way
        assert codes.meta["group_size"] == chosen(w, 4, alpha, 4, sym)


def test_small_groups_where_they_narrow_the_range_and_whole_rows_where_not() -> None:
    method = tersor.quantizer("finequant")
    assert method.granularity(normal(64, 1024)) == 64
    even = normal(64, 1024).sign()  # the same range in every group
    assert method.granularity(even) == 1024
    halves = torch.cat([even, 0.1 * even], 1)  # one halving takes all there is to gain
    assert method.granularity(halves) == 1024


def test_only_outliers_split_groups_at_a_high_alpha() -> None:
    method = tersor.quantizer("finequant", alpha=0.1)
    w = normal(32, 1024)
    assert method.granularity(w) == 1024
    w[:, 77] *= 30
    assert method.granularity(w) < 1024


def test_equals_rounding_in_fixed_groups_of_the_chosen_size() -> None:
    w = normal(16, 288)
    for options in ({}, {"bits": 3, "sym": False}, {"bits": 2, "clip": True}, {"bits": 8}):
        fine = tersor.quantizer("finequant", **options)
        codes = fine.quantize(w)
        assert codes.meta["group_size"] == 72
        fixed = tersor.quantizer("rtn", **{"sym": True, **options, "group_size": 72})
        assert torch.equal(fine.dequantize(codes), fixed.dequantize(fixed.quantize(w)))


def test_less_error_than_whole_rows_and_fewer_bits_than_groups_of_64() -> None:
    w = normal(64, 576)
    w[:, ::97] *= 5
    fine = tersor.quantizer("finequant")
    row, fixed = (tersor.quantizer("rtn", sym=True, group_size=size) for size in (-1, 64))
    codes = {name: q.quantize(w) for name, q in (("fine", fine), ("row", row), ("fixed", fixed))}
    error = {name: float((codes[name].method.dequantize(codes[name]) - w).square().sum()) for name in codes}
    assert error["fine"] < 0.8 * error["row"]
    assert codes["fine"].nbytes < codes["fixed"].nbytes


@pytest.mark.parametrize("sym", [True, False])
def test_uniform_levels_are_the_values(sym: bool) -> None:
    w = normal(8, 300)
    fine = tersor.quantizer("finequant", sym=sym, smallest=16)
    codes = fine.quantize(w)
    uniform = fine.uniform(codes)
    assert uniform.group_size == codes.meta["group_size"] == 19
    assert torch.equal(uniform.dense(), fine.dequantize(codes))


def test_zero_weights_constant_rows_one_row_and_one_column() -> None:
    fine = tersor.quantizer("finequant", alpha=0.0, smallest=1)
    for w in (torch.zeros(3, 40), torch.full((3, 40), 2.0), normal(1, 40), normal(40, 1), torch.ones(1, 1)):
        back = fine.dequantize(fine.quantize(w))
        assert back.shape == w.shape
        assert float((back - w).abs().max()) <= 0.2 * float(w.abs().max())
    for dtype in (torch.float16, torch.bfloat16):
        back = fine.dequantize(fine.quantize(normal(4, 70).to(dtype)))
        assert back.dtype == dtype
        assert bool(torch.isfinite(back).all())


def test_wrong_settings_inputs_and_files() -> None:
    for wrong in ({"bits": 1}, {"bits": 9}, {"alpha": -0.1}, {"alpha": 1.5}, {"smallest": 0}):
        with pytest.raises(tersor.ConfigError):
            tersor.quantizer("finequant", **wrong)
    fine = tersor.quantizer("finequant")
    with pytest.raises(tersor.InputError):
        fine.quantize(torch.tensor([[1.0, float("inf")]]))
    codes = fine.quantize(normal(4, 200))
    for size in (0, -1, 201, 3.5, True, "64", 50):
        codes.meta["group_size"] = size
        for read in (fine.dequantize, fine.uniform):
            with pytest.raises(tersor.CorruptPayloadError):
                read(codes.to_bytes())


def test_conformance() -> None:
    assert_conforms("finequant", max_examples=3, fresh_process=False)
