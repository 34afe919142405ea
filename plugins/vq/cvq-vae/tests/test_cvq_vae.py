import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import tersor
from tersor.testing import assert_conforms
from tersor_cvq_vae import anchors


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(**settings):
    return tersor.quantizer("cvq-vae", **{"codes": 16, "dim": 3, **settings}).layer()


def similar(words, x, distance):
    """All scores in float64, K x N: the authors' d."""
    words, x = words.double(), x.double()
    if distance == "cos":
        return functional.normalize(words, dim=1) @ functional.normalize(x, dim=1).T
    return -torch.cdist(words, x).square()


def test_conformance():
    assert_conforms("cvq-vae", max_examples=3, fresh_process=False)


@pytest.mark.parametrize("distance", ["l2", "cos"])
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99])
def test_usage_shares_and_moves_are_equations_4_to_6(distance, decay):
    layer = small(anchor="closest", distance=distance, decay=decay)
    with torch.no_grad():
        layer.words.copy_(normal(16, 3, seed=9))
    usage = torch.zeros(16, dtype=torch.float64)
    moved = set()
    for step in range(12):
        x, before = normal(30, 3, seed=step), layer.words.detach().double()
        codes = similar(before, x, distance).argmax(0)
        assert torch.equal(layer(x).codes, codes)
        usage = decay * usage + (1 - decay) * torch.bincount(codes, minlength=16) / 30
        share = torch.exp(-usage * 16 * 10 / (1 - decay) - 1e-3)[:, None]
        anchor = x[similar(before, x, distance).argmax(1)]
        torch.testing.assert_close(layer.words.detach().double(), before * (1 - share) + anchor * share, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.usage.double(), usage, rtol=1e-5, atol=1e-8)
        moved |= {int(i) for i in torch.nonzero(share[:, 0] > 0.5)}
    assert 0 < len(moved) < 17


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 60), st.sampled_from(["l2", "cos"]), st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_loss_and_gradients_are_those_of_vq_vae(codes, dim, count, distance, seed):
    layer = small(codes=codes, dim=dim, distance=distance, commitment=0.5).eval()
    with torch.no_grad():
        layer.words.copy_(normal(codes, dim, seed=seed + 1))
    x, g = normal(count, dim, seed=seed).requires_grad_(), normal(count, dim, seed=seed + 2)
    values, indices, loss = layer(x)
    score = similar(layer.words.detach(), x.detach(), distance)
    if count:
        torch.testing.assert_close(score[indices, torch.arange(count)], score.amax(0), rtol=1e-5, atol=1e-5)
    e = layer.words.detach()[indices]
    assert torch.equal(values, e)
    torch.testing.assert_close(loss, 1.5 * (x.detach() - e).square().sum() / max(x.numel(), 1))
    ((values * g).sum() + loss).backward()
    size = max(x.numel(), 1)
    torch.testing.assert_close(x.grad, g + 0.5 * 2 * (x.detach() - e) / size)
    torch.testing.assert_close(
        layer.words.grad, torch.zeros_like(e[:0].new_zeros(codes, dim)).index_add_(0, indices, 2 * (e - x.detach()) / size)
    )


@pytest.mark.parametrize("distance", ["l2", "cos"])
@pytest.mark.parametrize(("size", "count"), [(5, 40), (30, 7), (1, 2), (3, 1)])
def test_contrastive_loss_and_its_gradient(distance, size, count, monkeypatch):
    monkeypatch.setattr("tersor_cvq_vae.cvq_vae._TILE", 2 * count)
    layer = small(codes=size, contrastive=True, distance=distance)
    with torch.no_grad():
        layer.words.copy_(normal(size, 3, seed=9))
    x = normal(count, 3)
    words = layer.words.detach().double().requires_grad_()
    score = similar(words, x, distance).sort(1).values
    pull = score[:, -max(1, count // size) :].mean(1, keepdim=True)
    logits = torch.cat([pull, score[:, : count // 2]], 1) / 0.07
    e = words[similar(words.detach(), x, distance).argmax(0)]
    plain = (e - x).square().mean() + 0.25 * (e.detach() - x).square().mean()
    expected = plain + functional.cross_entropy(logits, torch.zeros(size, dtype=torch.int64))
    loss = layer(x).loss
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(layer.words.grad.double(), words.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("distance", ["l2", "cos"])
def test_features_drawn_by_probability(distance, monkeypatch):
    monkeypatch.setattr(anchors, "_RUN", 4)
    words, x = normal(3, 2, seed=1), normal(10, 2, seed=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = anchors.by_probability(words.repeat_interleave(4000, 0), x, distance)
    frequency = (drawn[:, None] == x).all(2).float().view(3, 4000, 10).mean(1).double()
    assert float(frequency.sum()) == pytest.approx(3)
    odds = similar(words, x, distance).softmax(1)
    # five deviations of a share of 4000 draws
    assert bool(((frequency - odds).abs() < 5 * (odds * (1 - odds) / 4000).sqrt() + 1e-3).all())


def test_the_pool_fills_and_is_replaced():
    pool, one = torch.zeros(10, 2), torch.tensor
    x = torch.arange(1, 101.0)[:, None].expand(100, 2)
    filled = anchors.refill(pool, 0, x[:4], one([4]))
    assert (filled, pool[:, 0].tolist()) == (4, [1, 2, 3, 4] + [0] * 6)
    filled = anchors.refill(pool, 4, x[4:12], one([8]))  # six places are free
    assert (filled, pool[:, 0].tolist()) == (10, [*range(1, 11)])
    filled = anchors.refill(pool, 10, x[50:53], one([3]))
    assert filled == 10
    assert sorted(set(pool[:, 0].tolist()) & {51, 52, 53}) == [51, 52, 53]
    assert len(set(pool[:, 0].tolist()) & set(range(1, 11))) == 7
    anchors.refill(pool, 10, x[60:], one([40]))
    assert float(pool.min()) > 60


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("anchor", ["closest", "random", "probrandom"])
def test_nothing_is_as_large_as_vectors_times_codewords(anchor, monkeypatch):
    monkeypatch.setattr("tersor_cvq_vae.cvq_vae._TILE", 1 << 17)
    monkeypatch.setattr(anchors, "_WORDS", 128)
    x, layer = normal(2000, 3).requires_grad_(), small(codes=2500, anchor=anchor, contrastive=True)
    with Largest() as seen:
        out = layer(x)
        (out.values.sum() + out.loss).backward()
    assert 100_000 < seen.elements <= 512 * 2048  # of five million; tiles of the search


def test_dead_codewords_come_to_life():
    # in one cluster far from all vectors: nothing but re-anchoring brings them there
    layer = small(codes=32, decay=0.9)
    with torch.no_grad():
        layer.words.copy_(normal(32, 3) * 0.01 + 50)
    x = normal(400, 3) * 3
    assert len(layer.eval()(x).codes.unique()) < 16
    layer.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(60):
            layer(x)
    codes = layer.eval()(x).codes
    assert len(codes.unique()) >= 28
    assert float(layer.words.detach().abs().max()) < 15


def test_fit_uses_the_whole_codebook_at_any_scale():
    vectors = normal(1500, 4)
    errors = []
    for scale in (1.0, 1e-4, 1e4):
        moved = (vectors + 3) * scale
        fitted = tersor.quantizer("cvq-vae", codes=64, dim=4, steps=150).fit([moved])
        stored = fitted.quantize(moved)
        errors.append(float((fitted.dequantize(stored) / scale - vectors - 3).square().mean()))
        assert len(fitted._trained(moved).codes.unique()) >= 54
    assert max(errors) < 0.25
    assert max(errors) < 1.1 * min(errors)


_WORKER = """
out = []
for settings in ({"anchor": "closest"}, {"anchor": "closest", "distance": "cos"}, {}, {"anchor": "probrandom"}):
    layer = tersor.quantizer("cvq-vae", codes=20, dim=4, **settings).layer()
    torch.manual_seed(rank)
    for step, count in enumerate(((30, 20), (15, 0), (0, 0), (0, 9), (60, 60))):
        x = torch.randn(sum(count), 4, generator=torch.Generator().manual_seed(step))
        layer(x[: count[0]] if rank == 0 else x[count[0] :])
    out.append({k: v.detach() for k, v in layer.state_dict().items()})
"""


def test_all_processes_keep_one_codebook(in_two_processes):
    first, second = in_two_processes(_WORKER)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert math.isclose(float(a["usage"].sum()), 1 - 0.99**4, rel_tol=1e-4)  # four batches that are not empty
    # as one process with the vectors of both, where nothing is drawn
    for state, distance in zip(first[:2], ("l2", "cos"), strict=True):
        layer = tersor.quantizer("cvq-vae", codes=20, dim=4, anchor="closest", distance=distance).layer()
        for step, count in enumerate((50, 15, 0, 9, 120)):
            layer(normal(count, 4, seed=step))
        torch.testing.assert_close(state["words"], layer.words.detach(), rtol=1e-4, atol=1e-5)
