import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor.testing import assert_conforms


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(**settings):
    return tersor.quantizer("ste-affine", **settings).layer()


def test_conformance():
    assert_conforms("ste-affine", max_examples=3, fresh_process=False)


@given(
    st.integers(1, 30), st.integers(1, 6), st.integers(0, 30), st.integers(1, 4), st.sampled_from(["learned", "running", "none"])
)
@settings(deadline=None, max_examples=40)
def test_values_are_the_nearest_affine_codes(codes, dim, count, groups, kind):
    groups = min(groups, codes)
    layer = layer_of(codes=codes, dim=dim, affine=kind, groups=groups)
    for step in range(2):
        layer(vectors(40, dim, seed=step) * 3 + 1)
    if kind == "learned":
        for i, p in enumerate((layer.affine.scale, layer.affine.bias)):
            p.data.copy_(vectors(groups, dim, seed=i))
    x = vectors(count, dim)
    values, indices, loss = layer.eval()(x)
    words = layer.book.words.detach().double()
    if kind != "none":
        group = [k * groups // codes for k in range(codes)]
        if kind == "learned":
            scale, bias = 1 + 2 * layer.affine.scale.detach().double(), 2 * layer.affine.bias.detach().double()
        else:
            means, variances = layer.affine.means.double(), layer.affine.variances.double()
            scale = ((variances[0] + 1e-8) / (variances[1:] + 1e-8)).sqrt().clamp(max=10)
            bias = means[0] - scale * means[1:]
        words = scale[group] * words + bias[group]
    distances = (x.double()[:, None] - words).square().sum(-1)
    torch.testing.assert_close(distances[torch.arange(count), indices], distances.amin(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values.detach(), words[indices].float(), rtol=1e-4, atol=1e-5)
    expected = 2 * (words[indices] - x).square().mean().float() if count else torch.tensor(0.0)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_step_on_a_few_vectors_moves_all_codes_only_if_they_are_affine():
    for kind, every in (("none", False), ("learned", True)):
        layer = layer_of(codes=64, dim=8, affine=kind, inner=0, nu=0)
        layer(vectors(500, 8))
        before = layer.codebook.detach().clone()
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        layer(vectors(3, 8, seed=1) + 1).loss.backward()
        optimizer.step()
        moved = (layer.codebook.detach() - before).norm(dim=1) > 0
        assert bool(moved.all()) == every
        assert every or int(moved.sum()) <= 3


def test_running_statistics_match_the_moments_of_the_vectors():
    layer = layer_of(codes=64, dim=4, affine="running", groups=2, inner=0, nu=0)
    layer(vectors(2000, 4))
    moved = vectors(2000, 4, seed=1) * torch.tensor([2.0, 0.5, 1.0, 3.0]) + torch.tensor([5.0, 0.0, -5.0, 1.0])
    for _ in range(100):
        layer(moved)
    codes = layer.codebook.detach().view(2, 32, 4)
    for group in codes:
        torch.testing.assert_close(group.mean(0), moved.mean(0), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(group.std(0, correction=0), moved.std(0, correction=0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["none", "learned"])
def test_inner_steps_are_sgd_on_fixed_vectors(kind):
    layer = layer_of(codes=6, dim=8, affine=kind, inner=3, inner_rate=20.0, nu=0)
    x = vectors(60, 8)
    layer(x)
    if kind == "learned":
        layer.affine.scale.data.fill_(0.1)
        layer.affine.bias.data.fill_(0.05)
    words = layer.book.words.detach().double().requires_grad_()
    a, b = (1.2, 0.1) if kind == "learned" else (1.0, 0.0)
    y = vectors(60, 8, seed=1)
    codes = layer.eval()(y).codes
    share = 2 * 20.0 * torch.bincount(codes, minlength=6).double()[:, None] / (60 * 8) * a * a
    for _ in range(3):
        loss = (a * words[codes] + b - y).square().mean()
        (grad,) = torch.autograd.grad(loss, words)
        words = (words - 20.0 * grad / share.clamp(min=1)).detach().requires_grad_()
    layer.train()(y)
    torch.testing.assert_close(layer.book.words.detach(), words.detach().float(), rtol=1e-4, atol=1e-5)


def test_a_great_inner_rate_ends_at_the_means():
    layer = layer_of(codes=4, dim=3, affine="none", inner=1, inner_rate=1e9)
    layer(vectors(50, 3))
    y = vectors(50, 3, seed=1)
    values, codes, _ = layer(y)
    for k in codes.unique():
        torch.testing.assert_close(layer.book.words.detach()[k], y[codes == k].mean(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(values.detach(), layer.book.words.detach()[codes])


@pytest.mark.parametrize("inner", [0, 1])
def test_gradients_of_vectors_and_codes(inner):
    layer = layer_of(codes=6, dim=4, affine="learned", affine_rate=3.0, inner=inner, inner_rate=0.0, nu=0.7, alpha=5.0, beta=0.9)
    layer(vectors(50, 4))
    x = vectors(10, 4, seed=1).requires_grad_()
    task = vectors(10, 4, seed=2)
    values, codes, loss = layer(x)
    ((values * task).sum() + loss).backward()
    words = layer.book.words.detach()
    error = words[codes] - x.detach()
    torch.testing.assert_close(values.detach(), words[codes])
    torch.testing.assert_close(x.grad, task - 5 * 0.1 * 2 * error / 40)
    pull = 5 * 0.9 * 2 * error / 40
    each = 0.7 * task + pull
    torch.testing.assert_close(layer.affine.bias.grad[0], 3 * each.sum(0))
    torch.testing.assert_close(layer.affine.scale.grad[0], 3 * (each * words[codes]).sum(0))
    # codewords: the task, and the loss where no inner steps take its place
    torch.testing.assert_close(
        layer.book.words.grad, torch.zeros(6, 4).index_add_(0, codes, 0.7 * task + (0 if inner else 1) * pull)
    )


def test_the_codebook_follows_vectors_that_drift():
    errors = {}
    for name, options in {"plain": {"affine": "none", "inner": 0}, "straight": {"affine": "running", "inner": 1}}.items():
        layer = layer_of(codes=64, dim=4, nu=0, **options)
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad] or [torch.zeros(1)], 0.01)
        for step in range(60):
            z = vectors(300, 4, seed=step) * (1 + step / 20) + step / 10
            loss = layer(z).loss
            if loss.requires_grad:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        values, codes, _ = layer.eval()(z)
        errors[name] = (float((values.detach() - z).square().mean()), len(codes.unique()))
    assert errors["straight"][0] < 0.5 * errors["plain"][0]
    assert errors["straight"][1] > errors["plain"][1]


def test_fit_and_typed_errors():
    x = vectors(2000, 8) * 3 + 1
    fitted = tersor.quantizer("ste-affine", codes=64, dim=8, steps=100).fit([x])
    assert float((fitted.dequantize(fitted.quantize(x)) - x).square().mean()) < 0.5 * float(x.var())
    assert fitted.quantize(x).nbytes < 2000 * 6 / 8 + 300
    with pytest.raises(tersor.ConfigError, match="groups=9 of codes=8"):
        tersor.quantizer("ste-affine", codes=8, groups=9)


_RANK = """
out = {}
for kind, nu in (("running", 0.0), ("learned", 1.0)):
    layer = tersor.quantizer("ste-affine", codes=9, dim=4, affine=kind, nu=nu).layer()
    together = torch.nn.parallel.DistributedDataParallel(layer) if nu else layer
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], 0.1) if nu else None
    for step in range(6):
        z = torch.randn((20, 0)[(rank + step) % 2] if step % 3 else 12, 4, generator=torch.Generator().manual_seed(rank)) + rank
        values, _, loss = together(z)
        if optimizer:
            optimizer.zero_grad()
            (values.square().sum() + loss).backward()
            optimizer.step()
    out[kind] = {k: v.detach() for k, v in layer.state_dict().items()}
"""


def test_all_processes_keep_one_codebook(in_two_processes):
    both = in_two_processes(_RANK)
    for kind in ("running", "learned"):
        first, second = (states[kind] for states in both)
        assert all(torch.equal(first[k], second[k]) for k in first)
