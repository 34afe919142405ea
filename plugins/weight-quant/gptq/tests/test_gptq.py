"""GPTQ against optimal brain quantization in a fixed order, written out in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

import tersor
from tersor import Calibration
from tersor.testing import assert_conforms

torch.set_num_threads(1)
RATIOS = [1 - 0.05 * i for i in range(13)]


def layer(out: int, columns: int, samples: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns // 3 + 1, generator=g) @ torch.randn(columns // 3 + 1, columns, generator=g)
    x += 0.3 * torch.randn(samples, columns, generator=g)
    x[:, ::7] *= 4
    return torch.randn(out, columns, generator=g), x


def grid(group: torch.Tensor, bits: int, sym: bool, clip: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row of a group."""
    steps = 2**bits - 1
    low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    found = []
    for ratio in RATIOS if clip else [1.0]:
        scale = ((high - low) * ratio / steps).half().double()
        zero = torch.full_like(scale, 2 ** (bits - 1)) if sym else torch.round(-low * ratio / scale).nan_to_num(0).clamp(0, steps)
        found.append((scale, zero, (nearest(group, scale, zero, steps) - group).square().sum(1)))
    best = torch.stack([e for *_, e in found]).argmin(0)
    pick = lambda k: torch.stack([f[k] for f in found])[best, torch.arange(len(best))]  # noqa: E731
    return pick(0), pick(1)


def nearest(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, steps: int) -> torch.Tensor:
    scale, zero = scale[:, None], zero[:, None]
    return ((torch.round((w / scale).nan_to_num(0)) + zero).clamp(0, steps) - zero) * scale


def brain(w, x, bits, size, sym, act_order, static, clip, damp=0.01) -> torch.Tensor:
    """OBQ with all rows in one order: after each column the others move to their optimum, and it leaves the inverse Hessian."""
    w, h, n = w.double().clone(), (2 * x.T @ x).double(), w.shape[1]
    size = n if size == -1 else size
    dead = h.diagonal() == 0
    h += torch.diag(dead.double()) * h.diagonal().mean()
    original = w.clone()
    w[:, dead] = 0
    order = (h.diagonal() * ~dead).argsort(descending=True, stable=True) if act_order else torch.arange(n)
    inverse = torch.linalg.inv(h + damp * (h.diagonal() * ~dead).mean() * torch.eye(n))
    grids = [grid(original[:, c : c + size], bits, sym, clip) for c in range(0, n, size)] if static else []
    q = torch.zeros_like(w)
    for position, k in enumerate(order.tolist()):
        if static:
            scale, zero = grids[k // size]
        elif position % size == 0:
            scale, zero = grid(w[:, order[position : position + size]], bits, sym, clip)
        q[:, k] = nearest(w[:, k : k + 1], scale, zero, 2**bits - 1)[:, 0]
        w -= ((w[:, k] - q[:, k]) / inverse[k, k])[:, None] * inverse[k]
        w[:, k] = q[:, k]
        for_good = order[: position + 1]
        inverse = inverse - inverse[:, k : k + 1] * inverse[k : k + 1] / inverse[k, k]
        inverse[for_good] = 0
        inverse[:, for_good] = 0
    return q


OPTIONS = list(itertools.product([2, 4], [-1, 5, 8], [False, True], [False, True], [False, True], [False, True]))


@pytest.mark.parametrize("dead", [False, True])
def test_equals_optimal_brain_quantization_for_all_options(dead: bool) -> None:
    w, x = layer(9, 21)
    if dead:
        x[:, [3, 11]] = 0
    for bits, size, sym, act_order, static, clip in OPTIONS:
        gptq = tersor.quantizer("gptq", bits=bits, group_size=size, sym=sym, act_order=act_order, static_groups=static,
                                clip=clip, block_size=4)  # fmt: skip
        found = gptq.dequantize(gptq.quantize(w, x)).double()
        expected = brain(w, x, bits, size, sym, act_order, static, clip)
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6), str(gptq)


def test_identity_hessian_is_round_to_nearest() -> None:
    w = layer(12, 50)[0]
    for settings in ({}, {"sym": True, "bits": 3}, {"clip": True}, {"static_groups": True}, {"group_size": -1}):
        settings = {"group_size": 16, **settings}
        plain = {k: v for k, v in settings.items() if k != "static_groups"}
        gptq, rtn = tersor.quantizer("gptq", **settings), tersor.quantizer("rtn", **plain)
        found = gptq.dequantize(gptq.quantize(w, Calibration(gram=3 * torch.eye(50), count=9)))
        assert torch.equal(found, rtn.dequantize(rtn.quantize(w)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("settings", [{}, {"act_order": False}, {"static_groups": True}, {"sym": True}, {"group_size": -1}])
def test_less_output_error_than_round_to_nearest(bits: int, settings: dict) -> None:
    w, x = layer(48, 144, 600)
    settings = {"group_size": 32, "bits": bits, **settings}
    rtn = tersor.quantizer("rtn", **{k: v for k, v in settings.items() if k not in ("act_order", "static_groups")})
    gptq = tersor.quantizer("gptq", **settings)
    errors = [float((x[300:] @ (w - q.dequantize(q.quantize(w, x[:300]))).T).square().sum()) for q in (gptq, rtn)]
    assert errors[0] < 0.5 * errors[1]


def test_block_size_changes_nothing() -> None:
    w, x = layer(16, 150, 300)
    results = []
    for block in (1, 7, 32, 500):
        gptq = tersor.quantizer("gptq", block_size=block)
        results.append(gptq.dequantize(gptq.quantize(w, x)))
    assert all(float((r - results[0]).square().mean()) < 1e-3 * float((w - results[0]).square().mean()) for r in results)


def test_inputs_and_their_gram_are_the_same_calibration() -> None:
    w, x = layer(8, 30)
    gptq = tersor.quantizer("gptq", group_size=8)
    one = gptq.quantize(w, x).to_bytes()
    assert one == gptq.quantize(w, Calibration(gram=x.T @ x, count=200)).to_bytes()
    assert one == gptq.quantize(w, Calibration(inputs=x.view(10, 20, 30))).to_bytes()


def test_cost_of_act_order_is_the_group_of_every_column() -> None:
    w, x = layer(64, 576, 100)
    sizes = {k: tersor.quantizer("gptq", act_order=k).quantize(w, x).nbytes for k in (False, True)}
    payload = 64 * 576 // 2 + 64 * 5 * 2 + 64 * 5 // 2
    assert payload <= sizes[False] <= payload + 128
    assert abs(sizes[True] - sizes[False] - 576 * 3 // 8) <= 48  # 5 groups: 3 bits a column; the headers differ too


def test_extreme_weights() -> None:
    w, x = layer(6, 20)
    gptq = tersor.quantizer("gptq", bits=8, group_size=8)
    for scale in (1e-30, 1e-6, 1e30):
        back = gptq.dequantize(gptq.quantize(w * scale, x))
        assert float((back / scale - w).abs().max()) < 0.2
    assert torch.equal(gptq.dequantize(gptq.quantize(w * 0, x)), w * 0)


def test_few_samples_raise_no_error_and_no_damping_raises_the_damping() -> None:
    w, x = layer(6, 20)
    gptq = tersor.quantizer("gptq", group_size=8)
    assert bool(torch.isfinite(gptq.dequantize(gptq.quantize(w, x[:1]))).all())
    gram = torch.ones(20, 20) - 1e-3 * torch.eye(20)
    with pytest.warns(UserWarning, match="singular"):
        tersor.quantizer("gptq", group_size=8, damp=0.0).quantize(w, Calibration(gram=gram, count=1))


def test_wrong_settings_inputs_and_calibration() -> None:
    w, x = layer(4, 10)
    for settings in ({"bits": 1}, {"bits": 9}, {"group_size": 0}, {"group_size": -2}, {"damp": -0.1}, {"block_size": 0}):
        with pytest.raises(tersor.ConfigError):
            tersor.quantizer("gptq", **settings)
    gptq = tersor.quantizer("gptq")
    broken = w.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(tersor.InputError):
        gptq.quantize(broken, x)
    for wrong in (None, Calibration(), x[:, :5], x * 0, Calibration(gram=torch.eye(9)), Calibration(gram=1 - 3 * torch.eye(10))):
        with pytest.raises(tersor.CalibrationError):
            gptq.quantize(w, wrong)


def test_conformance() -> None:
    assert_conforms("gptq", max_examples=3)
