"""Dual binarization against brute force and least squares in float64; distillation against its formula and on a small network."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor import Calibration
from tersor.testing import assert_conforms
from tersor_db_llm.planes import binarize, dense, fit_alpha, initialise, planes, refit

torch.set_num_threads(1)


def layer(out: int, columns: int, samples: int = 300, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns // 3 + 1, generator=g) @ torch.randn(columns // 3 + 1, columns, generator=g)
    x += 0.3 * torch.randn(samples, columns, generator=g)
    return torch.randn(out, columns, generator=g), x


def output_error(w: torch.Tensor, q: torch.Tensor, x: torch.Tensor) -> float:
    return float((x.double() @ (w - q).double().T).square().sum())


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), ratio=st.floats(0.05, 0.95), positive=st.booleans())
def test_thresholds_of_the_paper_give_the_nearest_of_the_four_levels(seed: int, ratio: float, positive: bool) -> None:
    w = torch.randn(40, generator=torch.Generator().manual_seed(seed))
    a1 = torch.tensor(1.0 if positive else -1.0)
    a2 = -ratio * a1
    b1, b2 = binarize(w, a1, a2)
    levels = torch.stack([torch.zeros(()), a2, a1, a1 + a2])
    nearest = (w - levels[:, None]).abs().amin(0)
    assert torch.allclose((w - a1 * b1 - a2 * b2).abs(), nearest, atol=1e-6)


def test_planes_of_levels_by_hand() -> None:
    s = torch.tensor(0.5)
    b1, b2 = binarize(torch.tensor([-0.6, -0.2, 0.1, 0.45, 0.8, 3.0]), 2 * s, -s)
    assert b1.tolist() == [False, False, False, True, True, True]
    assert b2.tolist() == [True, False, False, True, False, False]


def test_scales_are_close_to_the_best_of_a_search() -> None:
    w = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    a1, a2 = fit_alpha(w)
    b1, b2 = binarize(w, a1, a2)
    found = (w - a1 * b1 - a2 * b2).square().sum(0)
    best = torch.full((8,), torch.inf)
    for big in torch.linspace(0.1, 3, 60):
        for small in torch.linspace(0.05, 1, 40):
            for sign in (1.0, -1.0):
                p1, p2 = torch.full((8,), sign * float(big)), torch.full((8,), -sign * float(big * small))
                c1, c2 = binarize(w, p1, p2)
                best = torch.minimum(best, (w - p1 * c1 - p2 * c2).square().sum(0))
    assert bool((found < 1.35 * best + 1e-6).all())
    assert bool((a1 * a2 < 0).all())


def test_exact_where_weights_are_such_levels() -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (6, 32), generator=g)
    codes[:, ::8] = 0  # all four levels are in every group
    codes[:, 1::8], codes[:, 2::8], codes[:, 3::8] = 1, 2, 3
    w = torch.tensor([0.0, -0.25, 0.5, 0.25])[codes]
    db = tersor.quantizer("db-llm", group_size=8)
    assert torch.allclose(db.dequantize(db.quantize(w, Calibration(gram=torch.eye(32), count=32))), w, atol=1e-3)


@pytest.mark.parametrize(("columns", "size"), [(24, 8), (21, 8), (5, 64)])
def test_refitted_scales_are_the_least_squares_of_the_output(columns: int, size: int) -> None:
    w, x = layer(4, columns)
    h = x.T @ x
    codes, alpha = initialise(w, h, size, 0.01)
    found = refit(w, codes, alpha, h, size, 0.01)
    damped = h.double() + 0.01 * h.diagonal().mean() * torch.eye(columns)
    b = planes(codes, size).double()
    for row in range(4):
        design = torch.block_diag(*[b[:, row, g].T for g in range(b.shape[2])])[:columns]  # columns x (groups, planes)
        root = torch.linalg.cholesky(damped).T
        best = torch.linalg.lstsq(root @ design, root @ w[row].double(), driver="gelsd").solution
        least = (root @ (w[row].double() - design @ best)).square().sum()
        ours = (root @ (w[row].double() - dense(planes(codes, size), found, columns)[row].double())).square().sum()
        assert float(ours) <= 1.001 * float(least) + 1e-6
    before, after = dense(planes(codes, size), alpha, columns), dense(planes(codes, size), found, columns)
    assert output_error(w, after, x) < output_error(w, before, x)


def test_below_2_bit_rounding_and_no_bigger_than_it() -> None:
    w, x = layer(64, 192, 600)
    db, rtn = tersor.quantizer("db-llm"), tersor.quantizer("rtn", bits=2, group_size=32, clip=True)
    ours, theirs = db.quantize(w, x[:300]), rtn.quantize(w)
    assert ours.nbytes < theirs.nbytes
    assert output_error(w, db.dequantize(ours), x[300:]) < 0.5 * output_error(w, rtn.dequantize(theirs), x[300:])


def test_planes_are_entropy_coded_where_that_is_smaller() -> None:
    db = tersor.quantizer("db-llm")
    eye = Calibration(gram=torch.eye(128), count=128)
    sparse = torch.where(torch.rand(32, 128, generator=torch.Generator().manual_seed(0)) < 0.95, 0.0, 1.0)
    coded, plain = db.quantize(sparse, eye), db.quantize(layer(1, 128)[0], eye)
    assert coded.nbytes < 32 * 128 // 4
    for codes in (coded, plain):
        assert torch.equal(db.dequantize(codes), db.dequantize(codes.to_bytes()))


def test_loss_by_hand() -> None:
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(7, 5, generator=g), 3 * torch.randn(7, 5, generator=g)
    p, q = t.double().softmax(1), s.double().softmax(1)
    cost = [-float((p[i] * q[i].log()).sum()) for i in range(7)]
    h = [float((p[i] * p[i].log()).sum() * (q[i] * q[i].log()).sum()) for i in range(7)]
    found = tersor.quantizer("db-llm", focus=2.0).loss(s, t)
    assert float(found) == pytest.approx(sum(c * v**2 for c, v in zip(cost, h, strict=True)) / sum(v**2 for v in h), rel=1e-4)
    assert float(tersor.quantizer("db-llm", distill="plain").loss(s, t)) == pytest.approx(sum(cost) / 7, rel=1e-5)
    assert float(tersor.quantizer("db-llm", focus=0.0).loss(s, t)) == pytest.approx(sum(cost) / 7, rel=1e-5)


class Small(torch.nn.Module):
    """Predicts a next token from the one before, through two blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(30, 24)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 24)) for _ in range(2)
        )
        self.head = torch.nn.Linear(24, 30)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return 3 * self.head(x)


@pytest.mark.parametrize("distill", ["deviation", "plain"])
def test_distillation_brings_a_network_closer_and_leaves_it_as_it_was(distill: str) -> None:
    from tersor.model import quantize

    model = Small().eval()
    batches = list(torch.randint(0, 30, (6, 2, 40), generator=torch.Generator().manual_seed(1)))
    new = torch.arange(30)[None]
    lost = {}
    for steps in (0, 40):
        db = tersor.quantizer("db-llm", group_size=12, steps=steps, window=32, rate=0.02, distill=distill)
        student = copy.deepcopy(model)
        payloads = quantize(student, db, batches)
        assert len(payloads) == 4
        for name, payload in payloads.items():
            assert torch.equal(student.get_parameter(name), db.dequantize(payload))
        with torch.no_grad():
            told, said = model(new).log_softmax(-1), student(new).log_softmax(-1)
        lost[steps] = float((told.exp() * (told - said)).sum())
        assert all(p.requires_grad for p in student.parameters())
    assert lost[40] < 0.8 * lost[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), Small().parameters(), strict=True))


def test_only_the_layers_of_a_recipe_are_studied() -> None:
    from tersor.model import quantize

    model = Small().eval()
    before = copy.deepcopy(model)
    batch = torch.arange(30)[None]
    recipe = [("blocks.1.*", "rtn:bits=8"), ("blocks.0.0.*", None)]
    payloads = quantize(model, tersor.quantizer("db-llm", group_size=8, steps=2), [batch], recipe)
    assert [payloads[n].method.name for n in sorted(payloads)] == ["db-llm", "rtn", "rtn"]
    assert torch.equal(model.blocks[0][0].weight, before.blocks[0][0].weight)


def test_extreme_weights_and_other_dtypes() -> None:
    w, x = layer(6, 20)
    db = tersor.quantizer("db-llm", group_size=8)
    usual = db.dequantize(db.quantize(w, x))
    for scale in (2.0**-90, 2.0**-20, 2.0**100):
        assert torch.allclose(db.dequantize(db.quantize(w * scale, x)) / scale, usual, atol=0.05)
    assert torch.equal(db.dequantize(db.quantize(w * 0, x)), w * 0)
    for dtype in (torch.float16, torch.bfloat16):
        back = db.dequantize(db.quantize(w.to(dtype), x))
        assert back.dtype == dtype
        assert torch.allclose(back.float(), usual, atol=0.2)
    assert bool(torch.isfinite(db.dequantize(db.quantize(w, x[:1]))).all())
    assert bool(torch.isfinite(db.dequantize(db.quantize(w, Calibration(gram=torch.ones(20, 20), count=1)))).all())


def test_wrong_settings_calibration_and_networks() -> None:
    from tersor.model import quantize

    w, x = layer(4, 10)
    for wrong in ({"group_size": 0}, {"steps": -1}, {"window": 1}, {"distill": "both"}, {"focus": -1.0}, {"rate": 2.0}):
        with pytest.raises(tersor.ConfigError):
            tersor.quantizer("db-llm", **wrong)
    db = tersor.quantizer("db-llm")
    for calibration in (
        None,
        Calibration(),
        x[:, :5],
        x * 0,
        Calibration(gram=torch.eye(9)),
        Calibration(gram=1 - 3 * torch.eye(10)),
    ):
        with pytest.raises(tersor.CalibrationError):
            db.quantize(w, calibration)
    with pytest.raises(tersor.CalibrationError, match="logits"):
        quantize(Vector(), db, [torch.ones(3, 8)])
    assert math.isfinite(
        float(quantize(Vector(), tersor.quantizer("db-llm", steps=0), [torch.ones(3, 8)])["layer.weight"].nbytes)
    )
    assert [m.steps for m in type(db).at_bits(2)] == [db.steps]
    assert type(db).at_bits(3) == []


class Vector(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.layer(x)]


def test_conformance() -> None:
    assert_conforms("db-llm", max_examples=3, fresh_process=False)
