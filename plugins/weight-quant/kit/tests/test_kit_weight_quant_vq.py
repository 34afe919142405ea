"""Vector quantization against float64, brute force, and the exact solutions of small problems."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor_kit_weight_quant import (
    block_factor,
    collect,
    feedback,
    fit_codebooks,
    from_int8,
    kmeans,
    ldl,
    lookup,
    mahalanobis_seeds,
    nearest,
    pack_order,
    to_int8,
    unpack_order,
)

torch.set_num_threads(1)


def hessian(n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * n, n, generator=g) @ torch.randn(n, n, generator=g)
    return x.T @ x / n


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_block_factor_is_a_factor_and_its_metric_the_cost_with_the_rest_free(dim: int) -> None:
    h = hessian(12)
    factor, pivots = ldl(h, None, 0.0)
    blocks, metric = block_factor(factor, pivots, dim)
    middle = torch.block_diag(*metric)
    assert torch.allclose(blocks @ middle @ blocks.T, h, rtol=1e-4, atol=1e-3 * float(h.max()))
    for b in range(12 // dim):
        rest = torch.linalg.inv(h.double()[b * dim :, b * dim :])
        assert torch.allclose(metric[b].double(), torch.linalg.inv(rest[:dim, :dim]), rtol=1e-3, atol=1e-3)
        assert torch.equal(blocks[b * dim : (b + 1) * dim, b * dim : (b + 1) * dim], torch.eye(dim))


@pytest.mark.parametrize("dim", [2, 3, 4])
@pytest.mark.parametrize("leaf", [1, 6, 100])
def test_feedback_in_steps_gives_each_step_the_best_values_left(dim: int, leaf: int) -> None:
    """What a step sees is the minimum over all columns still free, solved directly in float64."""
    n, rows = 12, 5
    h = hessian(n, 1)
    w = torch.randn(n, rows, generator=torch.Generator().manual_seed(2))
    blocks, _ = block_factor(*ldl(h, None, 0.0), dim)
    rounded = torch.zeros(n, rows, dtype=torch.float64)
    seen, groups = [], []

    def best(k: int) -> torch.Tensor:
        lost = w[:k].double() - rounded[:k]
        return w[k:].double() + torch.linalg.solve(h.double()[k:, k:], h.double()[k:, :k] @ lost)

    def enter(start: int, group: torch.Tensor) -> None:
        groups.append(start)
        assert torch.allclose(group.double(), best(start)[: group.shape[0]], atol=2e-2)

    def round_(k: int, value: torch.Tensor, error: torch.Tensor) -> None:
        seen.append(k)
        assert value.shape == error.shape == (dim, rows)
        assert torch.allclose(value.double(), best(k)[:dim], atol=2e-2)
        rounded[k : k + dim] = value.round()
        error.sub_(value.round())

    error = feedback(w.clone(), blocks, 2 * dim, enter, round_, leaf, dim)
    assert seen == list(range(0, n, dim))
    assert groups == list(range(0, n, 2 * dim))
    assert torch.allclose(error.double(), w.double() - rounded, atol=1e-5)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(1, 9), st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_nearest_is_brute_force(groups: int, dim: int, number: int, entries: int, weighted: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, c = torch.randn(groups, dim, number, generator=g), torch.randn(groups, entries, dim, generator=g)
    root = torch.randn(dim, dim, generator=g)
    m = root @ root.T + torch.eye(dim) if weighted else torch.eye(dim)
    away = (x.transpose(1, 2)[:, :, None] - c[:, None]).double()
    distance = torch.einsum("gnkd,de,gnke->gnk", away, m.double(), away)
    found = nearest(x, c, m if weighted else None)
    if dim == 1:
        distance = away.square().sum(3)
    chosen = distance.gather(2, found[:, :, None]).squeeze(2)
    assert torch.allclose(chosen, distance.amin(2), rtol=1e-3, atol=1e-4)


def test_nearest_in_chunks_is_the_same() -> None:
    g = torch.Generator().manual_seed(0)
    x, c = torch.randn(3, 2, 5000, generator=g), torch.randn(3, 256, 2, generator=g)
    found = nearest(x, c)
    apart = torch.stack([nearest(x[i : i + 1, :, j : j + 1000], c[i : i + 1])[0] for i in range(3) for j in range(0, 5000, 1000)])
    assert float((found.view(-1) == apart.view(-1)).float().mean()) > 0.999


def test_kmeans_is_lloyd_with_weights() -> None:
    g = torch.Generator().manual_seed(3)
    x, h = torch.randn(4, 2, 300, generator=g), torch.rand(4, 2, 300, generator=g)
    seeds = x[:, :, :7].transpose(1, 2).contiguous()
    found = kmeans(x, h, seeds, 5)
    for group in range(4):
        c = seeds[group].double()
        points, weights = x[group].T.double(), h[group].T.double()
        for _ in range(5):
            own = (weights[:, None] * (points[:, None] - c).square()).sum(2).argmin(1)
            c = torch.stack(
                [(weights * points)[own == k].sum(0) / weights[own == k].sum(0) if (own == k).any() else c[k] for k in range(7)]
            )
        assert torch.allclose(found[group].double(), c, atol=1e-4)


def test_kmeans_keeps_entries_without_vectors_and_ignores_vectors_without_weight() -> None:
    x = torch.tensor([[[0.0, 1.0, 100.0]]])
    h = torch.tensor([[[1.0, 1.0, 0.0]]])
    found = kmeans(x, h, torch.tensor([[[0.4], [50.0]]]), 10)
    assert torch.allclose(found, torch.tensor([[[0.5], [50.0]]]))


def test_seeds_lie_at_equal_steps_of_the_mahalanobis_distance() -> None:
    g = torch.Generator().manual_seed(4)
    x = torch.randn(2, 2, 101, generator=g) * torch.tensor([1.0, 100.0])[:, None]
    seeds = mahalanobis_seeds(x, 5)
    for group in range(2):
        points = x[group].T.double()
        centred = points - points.mean(0)
        distance = (centred @ torch.linalg.inv(centred.T @ centred) * centred).sum(1)
        expected = points[distance.argsort()[[0, 25, 50, 75, 100]]]
        assert torch.allclose(seeds[group].double(), expected, atol=1e-5)
    known = torch.zeros(2, 101, dtype=torch.bool)
    known[:, :10] = True
    inside = {tuple(v) for v in x[0, :, :10].T.tolist()}
    assert all(tuple(v) in inside for v in mahalanobis_seeds(x, 16, known)[0].tolist())
    assert bool(torch.isfinite(mahalanobis_seeds(torch.ones(1, 4, 9), 3)).all())


def test_codebooks_by_least_squares_are_the_exact_solution() -> None:
    """Against the pseudoinverse of the explicit design matrix, in float64."""
    g = torch.Generator().manual_seed(5)
    n, rows, entries = 8, 6, 5
    h = hessian(n, 6)
    w = torch.randn(n, rows, generator=g)
    index = torch.randint(0, entries, (n, rows), generator=g) + torch.tensor([0, 0, 0, 1, 1, 1]) * entries  # two bands of rows
    scale = torch.rand(n, rows, generator=g) + 0.5
    bend = collect(scale.square() * h.diagonal()[:, None], index, (1, 2, entries))
    found = fit_codebooks(
        w, h, torch.zeros(1, 2, entries), lambda b: lookup(b, index) * scale, lambda e: collect(e * scale, index, (1, 2, entries)),
        bend, 60, 2,
    )  # fmt: skip
    root = torch.linalg.cholesky(h.double()).T
    design = torch.zeros(n, rows, 2 * entries, dtype=torch.float64)
    design.scatter_(2, index[:, :, None], scale.double()[:, :, None])
    tall = torch.einsum("ij,jrk->irk", root, design).reshape(-1, 2 * entries)
    expected = (torch.linalg.pinv(tall) @ (root @ w.double()).reshape(-1, 1))[:, 0]
    used = torch.bincount(index.view(-1), minlength=2 * entries) > 0
    assert torch.allclose(found.view(-1).double()[used], expected[used], rtol=1e-2, atol=1e-2)


def test_few_steps_of_least_squares_never_end_above_the_start() -> None:
    g = torch.Generator().manual_seed(7)
    h, w = hessian(30, 8), torch.randn(30, 20, generator=g)
    index = torch.randint(0, 8, (30, 20), generator=g)
    bend = collect(h.diagonal()[:, None].expand(30, 20).contiguous(), index, (1, 8))
    start = torch.randn(1, 8, generator=g)
    losses = []
    for steps in range(5):
        found = fit_codebooks(
            w, h, start, lambda b: lookup(b, index), lambda e: collect(e.contiguous(), index, (1, 8)), bend, steps
        )
        e = w - lookup(found, index)
        losses.append(float((e * (h @ e)).sum()))
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(losses))


def test_codebooks_in_8_bits_and_orders() -> None:
    book = torch.randn(3, 4, 16, 2, generator=torch.Generator().manual_seed(9))
    book[0, 0] = 0.0
    codes, scale = to_int8(book, 2)
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float16, (3, 4))
    peak = book.flatten(2).abs().amax(2)
    assert bool(((from_int8(codes, scale) - book).flatten(2).abs().amax(2) <= peak / 254 * 1.02).all())
    for n in (1, 2, 255, 256, 257, 1536):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
        assert torch.equal(unpack_order(pack_order(order), n), order)
    with pytest.raises(ValueError, match="permutation"):
        unpack_order(pack_order(torch.zeros(9, dtype=torch.int64)), 9)
