"""DGQ: two-phase search against an independent float64 one, integer products against int64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tersor
from tersor import Calibration
from tersor.model import compress_layers, load_layers, save_layers
from tersor.testing import assert_conforms
from tersor_dgq import dgq
from tersor_dgq.dgq import CHANNEL_RATIOS, GROUP_RATIOS, DGQLinear

torch.set_num_threads(1)
QUICK = settings(max_examples=20, deadline=None)


def layer(out: int, columns: int, samples: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns // 3 + 1, generator=g) @ torch.randn(columns // 3 + 1, columns, generator=g)
    return torch.randn(out, columns, generator=g), x + 0.3 * torch.randn(samples, columns, generator=g)


def search(w: Tensor, x: Tensor, bits: int, size: int) -> Tensor:
    """Equations of section 3.2 row by row, group by group, with the outputs themselves in the place of X'X; float64."""
    w, x, steps = w.double(), x.double(), 2**bits - 1
    out = torch.zeros_like(w)
    for r, row in enumerate(w):
        found = []
        for c in range(0, len(row), size):
            group, inputs, tried = row[c : c + size], x[:, c : c + size], []
            low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
            for ratio in GROUP_RATIOS:
                scale = (high - low) * ratio / steps
                zero = round(-low * ratio / scale)
                q = ((group / scale).round() + zero).clamp(0, steps) - zero
                tried.append((float((inputs @ (q * scale - group)).square().sum()), scale, zero))
            found.append(min(tried, key=lambda t: t[0])[1:])
        tried = []
        for ratio in CHANNEL_RATIOS:
            channel = float((row.abs().max() * ratio / 127).half())
            q = torch.zeros_like(row)
            for g, (scale, zero) in enumerate(found):
                group = row[g * size : (g + 1) * size]
                multiple = min(max(round(scale / channel), 1), 127)
                reach = 127 // multiple
                code = ((group / (multiple * channel)).round() + zero).clamp(max(0, zero - reach), min(steps, zero + reach))
                q[g * size : (g + 1) * size] = (code - zero) * multiple * channel
            tried.append((float((x @ (q - row)).square().sum()), q))
        out[r] = min(tried, key=lambda t: t[0])[1]
    return out


@pytest.mark.parametrize(("bits", "size"), [(4, 8), (4, 7), (3, 21), (2, 5)])
def test_search_is_the_papers(bits: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dgq, "_FULL", len(CHANNEL_RATIOS))  # no short list: all fractions with the whole of X'X
    w, x = layer(6, 21)
    method = tersor.quantizer("dgq", bits=bits, group_size=size, smooth="off")
    found = method.dequantize(method.quantize(w, x)).double()
    expected = search(w, x, bits, size)
    same = (found - expected).abs().amax(1) < 1e-4
    assert float(same.float().mean()) > 0.8  # equal errors of two ratios may be told apart otherwise in float32
    errors = [float((x.double() @ (q - w).T).square().sum()) for q in (found, expected)]
    assert abs(errors[0] / errors[1] - 1) < 1e-3
    monkeypatch.undo()
    short = method.dequantize(
        method.quantize(w, x)
    ).double()  # inputs of rank 8 and groups of a few columns: the hardest case for it
    assert float((x.double() @ (short - w).T).square().sum()) < 1.5 * errors[1]


def integer_layer(columns: int, out: int, bits: int, size: int, seed: int, **options) -> tuple[DGQLinear, Tensor, Tensor]:
    w, x = layer(out, columns, seed=seed)
    x[:, 1] *= 50
    method = tersor.quantizer("dgq", bits=bits, group_size=size, **options)
    codes = method.quantize(w, x)
    return method.module(codes), method.dequantize(codes), x


@QUICK
@given(
    columns=st.integers(2, 50), out=st.integers(1, 20), bits=st.sampled_from([2, 3, 4, 6]), size=st.sampled_from([-1, 4, 16]),
    static=st.booleans(), smooth=st.sampled_from(["on", "off"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_product_is_of_integers(columns: int, out: int, bits: int, size: int, static: bool, smooth: str, seed: int) -> None:
    """int8 codes of both sides, int64 arithmetic: the layer's result is that, scaled, to the last bit of the sums."""
    options = {"smooth": smooth, "activations": "static" if static else "token", "percentile": 0.5}
    made, dense, x = integer_layer(columns, out, bits, size, seed, **options)
    w8 = made.matrix()
    assert w8.dtype == torch.int8
    assert int(w8.abs().max()) <= 127
    smoothed = x if made.inverse is None else x * made.inverse
    step = made.static if static else (smoothed.abs().amax(1, keepdim=True) / 127)
    x8 = (smoothed / step).round().clamp(-127, 127).to(torch.int8)
    sums = x8.long() @ w8.long().T
    assert torch.equal(made.integers()(x8), sums.float())
    assert torch.equal(made.integers()(x8).long(), sums)  # far below 2^24 here: no rounding at all
    assert torch.allclose(made(x), sums.float() * step * made.scale, rtol=1e-6)
    assert torch.allclose(made.weight, dense, rtol=1e-5)


def test_no_other_product_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    called: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    made, _, x = integer_layer(40, 16, 4, 16, 0)
    made(x)
    with Record():
        made(x)
    products = [c for c in called if any(word in c for word in ("mm", "bmm", "matmul", "linear"))]
    assert len(products) == 1
    assert any(word in products[0] for word in ("qlinear_pointwise", "_int_mm", "mm.default"))


def test_group_scales_are_whole_multiples() -> None:
    w, x = layer(10, 40)
    method = tersor.quantizer("dgq", group_size=16)
    codes = method.quantize(w, x)
    uniform = method.uniform(codes)
    assert torch.allclose(uniform.dense(), method.dequantize(codes), atol=1e-6)
    multiples = uniform.scale / codes.parts["scale"].float()[:, None]
    assert torch.allclose(multiples, multiples.round(), atol=1e-4)
    assert codes.bits_per_element < 4 + (4 + 7) / 13 + 16 / 40 + 8 * 250 / 400
    smoothed = tersor.quantizer("dgq", group_size=16, smooth="on", percentile=0.5)
    assert smoothed.uniform(smoothed.quantize(w, x)) is None


def test_smoothing_takes_the_channels_above_the_percentile() -> None:
    w, x = torch.randn(8, 200), torch.randn(50, 200).clamp(-1, 1)
    x[0] = 1.0
    x[0, 3], x[0, 7] = 20.0, -400.0
    method = tersor.quantizer("dgq", smooth="on", percentile=0.98, group_size=50)
    parts = method.quantize(w, x).parts
    assert parts["outliers"].tolist() == [3, 7]
    assert parts["factors"].tolist() == [20.0, 400.0]
    auto = tersor.quantizer("dgq", percentile=0.98, group_size=50)
    errors = {}
    x = torch.randn(50, 200)
    x[:, 3] *= 60  # all tokens: without smoothing every other channel has 4 levels or so
    for m in (auto, tersor.quantizer("dgq", smooth="off", group_size=50)):
        made = m.module(m.quantize(w, x))
        errors[str(m)] = float((made(x) - x @ w.T).square().sum())
    assert min(errors, key=errors.get) == str(auto)
    quiet = torch.randn(50, 200)
    quiet[0, 3] = 100.0  # one token: smoothing would cost the weights more than it gives that token
    assert "outliers" not in auto.quantize(w, quiet).parts
    assert "outliers" not in auto.quantize(w, Calibration(gram=x.T @ x, count=50)).parts
    assert (
        "outliers" in tersor.quantizer("dgq", smooth="on", percentile=0.9).quantize(w, Calibration(gram=x.T @ x, count=50)).parts
    )


def test_less_output_error_than_round_to_nearest_at_close_to_its_bits() -> None:
    w, x = layer(64, 256, 600)
    x[:, ::9] *= 5
    ours, rtn = tersor.quantizer("dgq", group_size=64, smooth="off"), tersor.quantizer("rtn", group_size=64, clip=True)
    a, b = ours.quantize(w, x[:300]), rtn.quantize(w)
    errors = [float((x[300:] @ (w - m.dequantize(c)).T).square().sum()) for m, c in ((ours, a), (rtn, b))]
    assert errors[0] < errors[1]
    assert a.nbytes < 1.03 * b.nbytes


def test_networks_of_layers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 5, bias=False)).requires_grad_(False)
    x = torch.randn(64, 24)
    for options in ({}, {"activations": "static"}, {"smooth": "on", "percentile": 0.8}):
        small = copy.deepcopy(net)
        compress_layers(small, tersor.quantizer("dgq", group_size=8, **options), [x])
        assert [type(m).__name__ for m in small] == ["DGQLinear", "ReLU", "DGQLinear"]
        assert float((small(x) - net(x)).square().mean()) < 0.02 * float(net(x).square().mean())


def test_networks_are_saved_and_loaded(tmp_path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 5)), torch.randn(64, 24)
    for options in ({"smooth": "on", "percentile": 0.8}, {"activations": "static"}):
        small, fresh = copy.deepcopy(net), copy.deepcopy(net)
        compress_layers(small, tersor.quantizer("dgq", group_size=8, **options), [x])
        load_layers(fresh, save_layers(small, tmp_path / "net.safetensors"))
        assert torch.equal(fresh(x), small(x))


def test_extreme_weights_and_calibration() -> None:
    w, x = layer(6, 20)
    method = tersor.quantizer("dgq", bits=6, group_size=8)
    usual = method.dequantize(method.quantize(w, x))
    for size in (1e-30, 1e-6, 1e30):
        assert torch.allclose(method.dequantize(method.quantize(w * size, x)) / size, usual, atol=0.05)
    assert not bool(method.dequantize(method.quantize(w * 0, x)).any())
    for poor in (x * 0, x[:1], Calibration(gram=torch.ones(20, 20)), x * 1e15):
        assert bool(method.dequantize(method.quantize(w, poor)).isfinite().all())


def test_wrong_settings_inputs_and_calibration() -> None:
    w, x = layer(4, 10)
    for wrong in ({"bits": 8}, {"group_size": 0}, {"smooth": "maybe"}, {"percentile": 1.5}, {"activations": "none"}):
        with pytest.raises(tersor.ConfigError):
            tersor.quantizer("dgq", **wrong)
    method = tersor.quantizer("dgq")
    for wrong in (None, Calibration(), x[:, :5], Calibration(gram=torch.eye(9)), Calibration(gram=-torch.eye(10)), x * 1e30):
        with pytest.raises(tersor.CalibrationError):
            method.quantize(w, wrong)
    with pytest.raises(tersor.CalibrationError, match="static"):
        tersor.quantizer("dgq", activations="static").quantize(w, Calibration(gram=x.T @ x, count=60))
    codes = method.quantize(w, x)
    codes.parts["multiple"] = torch.full_like(codes.parts["multiple"], 255)
    with pytest.raises(tersor.CorruptPayloadError):
        method.dequantize(codes)


def test_conformance() -> None:
    assert_conforms("dgq", max_examples=3, fresh_process=False)
