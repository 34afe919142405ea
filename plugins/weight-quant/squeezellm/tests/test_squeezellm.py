"""SqueezeLLM against brute force over all clusterings, an exact float64 search, and the sizes worked out by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor import Calibration
from tersor.testing import assert_conforms
from tersor_squeezellm.kmeans import kmeans

torch.set_num_threads(1)


def layer(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights with heavy tails, and sensitivities over several orders of magnitude."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g) * torch.randn(rows, columns, generator=g).abs()
    return x, torch.randn(rows, columns, generator=g).pow(4)


def error(x: torch.Tensor, weight: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Least weighted squared error of each row with these values, float64."""
    return ((x.double()[:, :, None] - means.double()[:, None, :]).square().amin(2) * weight.double()).sum(1)


def least(x: torch.Tensor, weight: torch.Tensor, clusters: int) -> torch.Tensor:
    """The optimum of each row: textbook dynamic programming over all intervals, float64."""
    out = []
    for row, w in zip(x.double(), weight.double(), strict=True):
        order = row.argsort()
        row, w = row[order], w[order]
        n = len(row)
        cost = torch.full((n + 1, n + 1), torch.inf, dtype=torch.float64)
        for start in range(n + 1):
            cost[start, start] = 0
            for end in range(start + 1, n + 1):
                part, share = row[start:end], w[start:end]
                mean = (part * share).sum() / share.sum() if float(share.sum()) > 0 else part.mean()
                cost[start, end] = ((part - mean).square() * share).sum()
        best = cost[0]
        for _ in range(clusters - 1):
            best = (best[:, None] + cost).amin(0)
        out.append(best[n])
    return torch.stack(out)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.sampled_from([4, 8]), st.integers(0, 10**6))
def test_few_values_are_clustered_optimally(n: int, clusters: int, seed: int) -> None:
    x, w = layer(3, n, seed)
    assert torch.allclose(error(x, w, kmeans(x, w, clusters)), least(x, w, clusters), rtol=1e-3, atol=1e-6 * float(w.max()))


def test_the_search_by_dynamic_programming_is_that_over_all_clusterings() -> None:
    x, w = layer(1, 7, 5)
    every = torch.tensor(list(itertools.product(range(3), repeat=7)))
    costs = []
    for labels in every:
        means = torch.stack([(w[0] * x[0])[labels == k].sum() / w[0][labels == k].sum().clamp(min=1e-30) for k in range(3)])
        costs.append(float(((x[0] - means[labels]).square() * w[0]).sum()))
    assert min(costs) == pytest.approx(float(least(x, w, 3)), rel=1e-4)


@pytest.mark.parametrize("clusters", [8, 16])
def test_many_values_are_clustered_within_two_per_cent_of_the_optimum(clusters: int) -> None:
    x, w = layer(3, 120, 1)
    found, best = error(x, w, kmeans(x, w, clusters)), least(x, w, clusters)
    assert bool((found > 0.999 * best).all())
    assert float((found / best).mean()) < 1.02


def test_means_of_clusters_are_their_weighted_means() -> None:
    x, w = layer(20, 400, 2)
    means = kmeans(x, w, 16)
    near = (x[:, :, None] - means[:, None, :]).abs().argmin(2)
    for k in range(16):
        mine = w.double() * (near == k)
        assert torch.allclose((mine * x).sum(1) / mine.sum(1), means[:, k].double(), rtol=1e-3, atol=1e-4)


def test_rows_without_weights_count_as_ones_and_levels_come_back_exactly() -> None:
    levels = torch.tensor([-2.0, -1.0, 0.5, 0.75, 1.0, 2.0, 3.0, 8.0])
    x = levels[torch.randint(0, 8, (5, 200), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(kmeans(x, torch.zeros_like(x), 8), levels.expand(5, 8))
    method = tersor.quantizer("squeezellm", bits=3, outliers=0.0, sensitive=0.0)
    found = method.dequantize(method.quantize(x, Calibration(gradients=torch.rand_like(x))))
    assert torch.equal(found, x)


def test_sparse_weights_are_the_most_sensitive_and_the_largest() -> None:
    x, f = layer(32, 100, 3)
    method = tersor.quantizer("squeezellm", bits=2, outliers=0.01, sensitive=0.005)
    back = method.dequantize(method.quantize(x, Calibration(gradients=f)))
    first = f.reshape(-1).topk(16).indices
    rest = x.abs().reshape(-1).clone()
    rest[first] = -1
    kept = torch.cat([first, rest.topk(32).indices])
    assert torch.equal(back.reshape(-1)[kept], x.half().float().reshape(-1)[kept])
    assert int((back == x.half()).sum()) < 32 * 100 / 4


def test_less_expected_loss_than_without_sensitivity_and_than_even_levels() -> None:
    x, f = layer(64, 500, 4)
    calibration = Calibration(gradients=f)
    others = [{}, {"weighted": False}, {"outliers": 0.0, "sensitive": 0.0}]
    methods = [tersor.quantizer("squeezellm", bits=3, **more) for more in others] + [tersor.quantizer("rtn", bits=3, clip=True)]
    loss = [float(((x - m.dequantize(m.quantize(x, calibration))).square() * f).sum()) for m in methods]
    ours, plain, dense, even = loss
    assert ours < 0.75 * plain
    assert ours < 0.95 * dense
    assert ours < 0.5 * even


def test_size_is_codes_codebooks_and_compressed_rows() -> None:
    x, f = layer(64, 576, 6)
    for bits, size, groups in ((3, -1, 1), (4, 288, 2), (2, 500, 2)):
        method = tersor.quantizer("squeezellm", bits=bits, group_size=size)
        codes = method.quantize(x, Calibration(gradients=f))
        kept = round(0.004 * x.numel()) + round(0.0005 * x.numel())
        most = codes.meta["kept_most"]
        parts = 64 * 576 * bits / 8 + 64 * groups * 2**bits * 2 + kept * (16 + 10) / 8 + 64 * most.bit_length() / 8
        assert parts <= codes.nbytes <= parts + 300


def test_inputs_their_gram_and_gradients_of_columns_are_the_same_calibration() -> None:
    x, _ = layer(8, 30)
    seen = torch.randn(50, 30, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 31)
    method = tersor.quantizer("squeezellm", bits=3, sensitive=0.02)
    first = method.dequantize(method.quantize(x, seen))
    for other in (Calibration(gram=seen.T @ seen), Calibration(gradients=seen.square().sum(0).expand(8, 30))):
        assert torch.allclose(method.dequantize(method.quantize(x, other)), first, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (3, 17)])
def test_extreme_weights_and_shapes(scale: float, shape: tuple[int, int]) -> None:
    x, f = layer(*shape)
    method = tersor.quantizer("squeezellm", bits=4, group_size=16)
    back = method.dequantize(method.quantize(x * scale, Calibration(gradients=f * 1e-20)))
    assert float((back / scale - x).abs().max()) < 0.5 * float(x.abs().max())
    assert torch.equal(method.dequantize(method.quantize(x * 0, Calibration(gradients=f))), x * 0)


def test_eight_bits_and_half_precision() -> None:
    x, f = layer(4, 600)
    method = tersor.quantizer("squeezellm", bits=8)
    assert float((method.dequantize(method.quantize(x, Calibration(gradients=f))) - x).abs().max()) < 0.3
    for dtype in (torch.float16, torch.bfloat16):
        back = method.dequantize(method.quantize(x.to(dtype), Calibration(gradients=f)))
        assert back.dtype == dtype
        assert float((back.float() - x).abs().max()) < 0.3


def test_wrong_settings_inputs_and_calibration() -> None:
    x, f = layer(4, 10)
    for wrong in ({"bits": 1}, {"bits": 9}, {"group_size": 0}, {"outliers": -0.1}, {"outliers": 0.6}, {"sensitive": 1.0}):
        with pytest.raises(tersor.ConfigError):
            tersor.quantizer("squeezellm", **wrong)
    method = tersor.quantizer("squeezellm")
    for broken, gradients in ((x * float("nan"), f), (x, f * float("inf"))):
        with pytest.raises(tersor.InputError):
            method.quantize(broken, Calibration(gradients=gradients))
    for wrong_data in (
        None, Calibration(), f[:, :5], f * 0, Calibration(gradients=-f), Calibration(gradients=f.T), Calibration(gradients=f * 0),
        Calibration(gram=torch.eye(9)), Calibration(gram=-torch.eye(10)),
    ):  # fmt: skip
        with pytest.raises(tersor.CalibrationError):
            method.quantize(x, wrong_data)


def test_rank_one_calibration() -> None:
    x, _ = layer(6, 20)
    seen = torch.zeros(1, 20)
    seen[0, 3] = 1.0
    method = tersor.quantizer("squeezellm", bits=2)
    back = method.dequantize(method.quantize(x, seen))
    assert bool(torch.isfinite(back).all())
    assert torch.allclose(back[:, 3], x[:, 3], rtol=1e-3)


def test_conformance() -> None:
    assert_conforms("squeezellm", max_examples=3, fresh_process=False)
