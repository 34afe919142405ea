import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import tersor
from tersor.testing import assert_conforms
from tersor_optvq import sinkhorn
from tersor_optvq.sinkhorn import transport


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plan(x, words, epsilon=10.0, iterations=5):
    """Logarithm of the paper's plan, whole and in float64."""
    cost = torch.cdist(x.double(), words.double())
    cost = (cost - cost.mean()) / cost.std()
    out = -epsilon * cost
    for _ in range(iterations):
        out = out - out.logsumexp(0, keepdim=True)
        out = out - out.logsumexp(1, keepdim=True)
    return out


def agrees(codes, x, words, epsilon=10.0, iterations=5):
    logs = plan(x, words, epsilon, iterations)
    # the root of a squared distance that float32 rounds is off by up to 1e-3 of the largest near 0, and entries may be as good as equal
    return float((logs.amax(1) - logs[torch.arange(len(x)), codes]).max()) < 3e-3 * epsilon


def test_conformance():
    assert_conforms("optvq", max_examples=3, fresh_process=False)


@given(st.integers(2, 300), st.integers(2, 200), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([0.0, 2.0, 30.0]),
       st.sampled_from([1e-20, 1.0, 1e25]), st.integers(1, 7), st.sampled_from([1.0, 10.0, 40.0]))  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_codes_are_the_largest_entries_of_the_plan(count, size, dim, seed, offset, scale, iterations, epsilon):
    x, words = normal(count, dim, seed=seed), normal(size, dim, seed=seed + 1) * 2 + offset
    codes = transport(x * scale, words * scale, epsilon, iterations)
    assert agrees(codes, x, words, epsilon=epsilon, iterations=iterations)


@pytest.mark.parametrize("kept", [0, 70 * 300, 1 << 24])
def test_tiles_and_what_is_kept_make_no_difference(kept, monkeypatch):
    x, words = normal(501, 6), normal(300, 6, seed=1)
    whole = transport(x, words)
    monkeypatch.setattr(sinkhorn, "_TILE", 7 * 300)
    monkeypatch.setattr(sinkhorn, "_KEPT", kept)
    assert agrees(transport(x, words), x, words)
    assert float((transport(x, words) == whole).float().mean()) > 0.99


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_the_distances_are_never_whole(monkeypatch):
    x, words = normal(2000, 6), normal(1500, 6, seed=1)
    monkeypatch.setattr(sinkhorn, "_TILE", 1 << 16)
    monkeypatch.setattr(sinkhorn, "_KEPT", 1 << 17)
    with Largest() as seen:
        torch.cdist(x[:100], words)
    assert seen.elements == 150_000
    layer = tersor.quantizer("optvq", codes=1500, dim=6).layer()
    with Largest() as seen:
        out = layer(x.requires_grad_())
        (out.values.sum() + out.loss).backward()
    assert 100_000 < seen.elements <= 1 << 17  # of three million


def test_outliers_and_codewords_far_from_everything():
    x, words = normal(400, 4), normal(50, 4, seed=1)
    x[3], words[:5] = 1000, torch.full((5, 4), -300.0) + normal(5, 4, seed=2)
    codes = transport(x, words)
    assert agrees(codes, x, words)
    assert len(codes.unique()) > 40
    nearest = torch.cdist(x, words).argmin(1)
    assert not bool((nearest < 5).any())
    assert bool((codes < 5).any())  # codewords that are nobody's nearest get vectors


def test_every_codeword_gets_its_share():
    x, words = normal(4096, 8), normal(64, 8, seed=1) * 0.1 + 2  # all to one side
    counts = torch.bincount(transport(x, words, epsilon=40.0, iterations=100), minlength=64)
    nearest = torch.bincount(torch.cdist(x, words).argmin(1), minlength=64)
    assert int((nearest > 0).sum()) < 50
    assert int(nearest.max()) > 400
    assert int((counts > 0).sum()) >= 60  # of the rows' largest entries; 64 are equal shares of the plan
    assert int(counts.max()) <= 150


def test_degenerate_batches():
    words = normal(5, 3)
    assert transport(torch.zeros(0, 3), words).shape == (0,)
    assert transport(words[3:4], words).tolist() == [3]
    assert transport(normal(7, 3), words[:1]).tolist() == [0] * 7
    for x in (torch.zeros(9, 3), words[:1].expand(9, 3)):
        codes = transport(x, words)
        assert int(codes.min()) >= 0
        assert int(codes.max()) < 5


@given(st.integers(1, 30), st.sampled_from([1, 2, 3]), st.booleans(), st.integers(0, 1000))
@settings(deadline=None, max_examples=15)
def test_training_takes_the_plan_and_evaluation_the_nearest(codes, heads, projection, seed):
    settings = {"heads": heads, "projection": projection, "seed": seed, "commitment": 0.5, "beta": 0.125}
    layer = tersor.quantizer("optvq", codes=codes, dim=6, **settings).layer()
    x, g = normal(40, 6, seed=seed).requires_grad_(), normal(40, 6, seed=seed + 1)
    words, parts = layer.codebook.detach(), x.detach().reshape(40 * heads, -1)
    values, indices, loss = layer(x)
    assert indices.shape == ((40,) if heads == 1 else (40, heads))
    assert codes == 1 or agrees(indices.reshape(-1), parts, words)
    e = words[indices.reshape(-1)].view(40, 6)
    assert torch.equal(values, e)
    torch.testing.assert_close(loss, 0.625 * (e - x.detach()).square().mean())
    ((values * g).sum() + loss).backward()
    torch.testing.assert_close(x.grad, g + 0.5 * 2 * (x.detach() - e) / 240)
    pulled = torch.zeros_like(words).index_add_(0, indices.reshape(-1), (0.125 * 2 * (e - x.detach()) / 240).view_as(parts))
    expected = pulled @ layer.projection.weight if projection else pulled
    torch.testing.assert_close(layer.embedding.grad, expected.detach())
    out = layer.eval()(x)
    distances = torch.cdist(parts, words)
    torch.testing.assert_close(distances.gather(1, out.codes.view(-1, 1))[:, 0], distances.amin(1), rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.values_to_codes(layer.codes_to_values(out.codes)), out.codes)


def test_heads_have_to_divide_the_dimension():
    with pytest.raises(tersor.ConfigError, match="heads=3, dim=8"):
        tersor.quantizer("optvq", dim=8, heads=3)


def test_fit_uses_the_whole_codebook():
    vectors = normal(2000, 4) * torch.tensor([9.0, 1.0, 1.0, 0.1]) + 20
    method = tersor.quantizer("optvq", codes=64, dim=4, steps=300)
    fitted = method.fit([vectors])
    untrained = method.with_state(method.layer().state_dict())
    used, error = zip(*((len(m._trained(vectors).codes.unique()), float((m.dequantize(m.quantize(vectors)) - vectors).square().mean()))
                        for m in (fitted, untrained)), strict=True)  # fmt: skip
    assert used[0] >= 60
    assert used[1] < 20
    assert error[0] < 0.05 * error[1]


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_fit_does_not_depend_on_the_scale(scale):
    vectors = normal(600, 4)
    method = tersor.quantizer("optvq", codes=16, dim=4, heads=2, steps=150)
    errors = []
    for factor in (1.0, scale):
        moved = (vectors + 2) * factor
        fitted = method.fit([moved])
        errors.append(float((fitted.dequantize(fitted.quantize(moved)) / factor - vectors - 2).square().mean()))
    assert errors[0] < 0.2
    assert abs(errors[1] / errors[0] - 1) < 0.05


_WORKER = """
layer = tersor.quantizer("optvq", codes=30, dim=4).layer()
out = []
for step, count in enumerate(((60, 40), (50, 0), (0, 0), (1, 0), (1, 2))):
    x = torch.randn(sum(count), 4, generator=torch.Generator().manual_seed(step))
    out.append(layer(x[: count[0]] if rank == 0 else x[count[0] :]).codes)
"""


def test_several_processes_solve_one_problem(in_two_processes):
    parts = in_two_processes(_WORKER)
    layer = tersor.quantizer("optvq", codes=30, dim=4).layer()
    for step, count in enumerate((100, 50, 0, 1, 3)):
        x = normal(count, 4, seed=step)
        together = torch.cat([p[step] for p in parts])
        assert together.shape == (count,)
        if count > 1:
            assert agrees(together, x, layer.codebook.detach())
        else:
            assert torch.equal(together, layer.eval()(x).codes)
        layer.train()
