"""Coordinate descent of the kit against one column at a time in float64, in any blocking."""

from __future__ import annotations

import pytest
import torch

import tersor
from tersor_kit_weight_quant import damped, descend, quadratic

torch.set_num_threads(1)


def test_equals_one_column_at_a_time_in_any_blocking() -> None:
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(37, 5, generator=g), torch.randn(90, 37, generator=g)
    h = damped(x.T @ x, 0.01)
    q = w.double().clone()
    for _ in range(2):
        for k in range(37):
            q[k] = torch.round((q[k] + h[k].double() @ (w.double() - q) / float(h[k, k])) / 0.4) * 0.4
    for block in (1, 8, 37, 100):
        error = torch.zeros_like(w)
        before = []
        for _ in range(2):
            descend(w, error, h, lambda k, best, lost: lost.sub_(torch.round(best / 0.4) * 0.4), block)
            before.append(quadratic(error, h))
        assert torch.allclose(w - error, q.float(), atol=1e-5)
        assert bool((before[1] <= before[0] * 1.0001).all())
        expected = torch.einsum("ir,ij,jr->r", error, h, error)
        assert torch.allclose(before[1], expected, rtol=1e-4)


def test_damping_and_inputs_that_are_all_zero() -> None:
    h = torch.tensor([[4.0, 1.0], [1.0, 0.0]])
    assert torch.allclose(damped(h, 0.5), torch.tensor([[1.25, 0.25], [0.25, 0.25]]))
    assert torch.allclose(damped(h * 1e30, 0.5), damped(h, 0.5))
    assert float(h[0, 0]) == 4.0
    with pytest.raises(tersor.CalibrationError, match="zero"):
        damped(h * 0, 0.01)
