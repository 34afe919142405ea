"""Elements kept beside the codes: exact, and no larger than compressed sparse rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor_kit_weight_quant import load_sparse, pack_wide, store_sparse, unpack_wide


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 700), st.floats(0, 1), st.integers(0, 10**6))
def test_round_trip_at_the_size_of_compressed_rows(rows: int, columns: int, density: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=g) < density
    places, values = kept.nonzero(), torch.randn(int(kept.sum()), generator=g).half()
    parts = store_sparse(places[:, 0], places[:, 1], values, (rows, columns))
    row, column, value = load_sparse(parts, (rows, columns))
    assert torch.equal(torch.stack([row, column], 1), places)
    assert torch.equal(value, values)
    size = sum(p.numel() * p.element_size() for p in parts.values() if isinstance(p, torch.Tensor))
    most = int(kept.sum(1).max())
    each = max(columns - 1, 1).bit_length() + 16
    assert size <= len(values) * each / 8 + rows * most.bit_length() / 8 + 6


@given(st.integers(1, 32), st.integers(0, 50), st.integers(0, 10**6))
def test_wide_numbers(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack_wide(codes, bits)
    assert packed.numel() <= count * bits / 8 + 4
    assert torch.equal(unpack_wide(packed, bits, count), codes)


def test_parts_that_do_not_fit() -> None:
    parts = store_sparse(torch.tensor([0, 2]), torch.tensor([4, 1]), torch.ones(2).half(), (3, 5))
    for name, wrong in (
        ("kept_most", 0), ("kept_most", 6), ("kept_most", "1"), ("kept_counts", torch.zeros(9, dtype=torch.uint8)),
        ("kept_values", torch.ones(3).half()), ("kept_values", torch.ones(2)), ("kept_columns", torch.full((1,), 63, dtype=torch.uint8)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="fit|bytes|column"):
            load_sparse({**parts, name: wrong}, (3, 5))
    with pytest.raises(KeyError):
        load_sparse({k: v for k, v in parts.items() if k != "kept_counts"}, (3, 5))
