import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor.testing import assert_conforms


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_conformance():
    assert_conforms("hifi-codec", max_examples=3, fresh_process=False)


@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 60), st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_each_part_is_quantized_depth_by_depth(codes, groups, depth, width, count, seed):
    method = tersor.quantizer(
        "hifi-codec", codes=codes, dim=groups * width, groups=groups, depth=depth, commitment=0.5, seed=seed
    )
    layer = method.layer()
    assert layer.sizes == (codes,) * (groups * depth)
    x = normal(count, groups * width, seed=seed)
    layer(x)
    layer.eval()
    values, found, loss = layer(x)
    assert found.shape == (count, groups * depth)
    losses, expected = [], torch.zeros(count, groups * width, dtype=torch.float64)
    for g in range(groups):
        columns = slice(g * width, (g + 1) * width)
        left = x.double()[:, columns]
        for r in range(depth):
            words = layer.codebooks[r * groups + g].words.double()
            chosen = found[:, r * groups + g]
            distances = (left[:, None] - words).square().sum(2)
            torch.testing.assert_close(distances[torch.arange(count), chosen], distances.amin(1), rtol=1e-4, atol=1e-5)
            left = left - words[chosen]
            losses.append(left.square().mean())
            expected[:, columns] += words[chosen]
    torch.testing.assert_close(values, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, 0.5 * torch.stack(losses).mean().float(), rtol=1e-4, atol=1e-6)
    codes_again = layer.values_to_codes(values)
    assert torch.equal(layer.codes_to_values(codes_again), values)


@pytest.mark.parametrize("decay", [0.99, 0.0])
def test_gradients_are_those_of_the_authors_residual_loop(decay):
    layer = tersor.quantizer("hifi-codec", codes=6, dim=4, commitment=0.25, decay=decay).layer()
    if decay:
        layer(normal(50, 4, seed=5))
    layer.eval()  # codebooks stay
    x = normal(9, 4, seed=1).requires_grad_()
    weights = normal(9, 4, seed=2)
    values, codes, loss = layer(x)
    ((values * weights).sum() + loss).backward()
    # the same in the straight-through form of the paper's loop: residual = residual - quantized
    z = x.detach().clone().requires_grad_()
    books = [b.words.detach().clone().requires_grad_() for b in layer.codebooks]
    residual, total, losses = z, 0.0, []
    for r in range(2):
        q = torch.cat([books[2 * r + g][codes[:, 2 * r + g]] for g in range(2)], 1)
        term = 0.25 * (q.detach() - residual).square().mean()
        losses.append(term + (q - residual.detach()).square().mean() * (decay == 0))
        through = residual + (q - residual).detach()
        residual, total = residual - through, total + through
    expected = torch.stack(losses).mean()
    ((total * weights).sum() + expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x.grad, z.grad)
    for book, own in zip(layer.codebooks, books, strict=True):
        assert isinstance(book.words, torch.nn.Parameter) == (decay == 0)
        if decay == 0:
            torch.testing.assert_close(book.words.grad, own.grad)


def test_codebooks_move_by_averages_of_what_was_left():
    layer = tersor.quantizer("hifi-codec", codes=5, dim=4, decay=0.9).layer()
    layer(normal(40, 4))
    before = [(b.words.clone(), b.counts.clone(), b.sums.clone()) for b in layer.codebooks]
    x = normal(30, 4, seed=3)
    _, codes, _ = layer(x)
    for g in range(2):
        left = x[:, 2 * g : 2 * g + 2]
        for r in range(2):
            words, counts, sums = before[2 * r + g]
            chosen = torch.nn.functional.one_hot(codes[:, 2 * r + g], 5).float()
            book = layer.codebooks[2 * r + g]
            torch.testing.assert_close(book.counts, 0.9 * counts + 0.1 * chosen.sum(0))
            torch.testing.assert_close(book.sums, 0.9 * sums + 0.1 * chosen.T @ left)
            left = left - words[codes[:, 2 * r + g]]


def test_released_start_is_uniform_and_small():
    layer = tersor.quantizer("hifi-codec", codes=64, dim=8, decay=0).layer()
    assert all(float(b.words.detach().abs().max()) <= 1 / 64 for b in layer.codebooks)
    assert not torch.equal(layer.codebooks[0].words, layer.codebooks[1].words)


def test_more_depth_less_error_and_the_size_that_is_stored():
    vectors = normal(3000, 8)
    errors = []
    for depth in (1, 2, 3):
        fitted = tersor.quantizer("hifi-codec", codes=16, dim=8, depth=depth, steps=40).fit([vectors])
        stored = fitted.quantize(vectors)
        assert stored.nbytes < 3000 * 8 * depth / 8 + 400
        errors.append(float((fitted.dequantize(stored) - vectors).square().mean()))
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.7 * errors[1]


@pytest.mark.parametrize("decay", [0.99, 0.0])
def test_fit_does_not_depend_on_the_unit_or_the_mean(decay):
    vectors, errors = normal(1000, 4), []
    for unit, offset in ((1.0, 0.0), (1e-3, 0.0), (1e4, 5e4)):
        x = vectors * unit + offset
        fitted = tersor.quantizer("hifi-codec", codes=8, dim=4, decay=decay, steps=60).fit([x])
        back = fitted.dequantize(fitted.quantize(x))
        errors.append(float((back - x).square().mean()) / unit**2)
    assert errors[0] < 0.3
    assert max(errors) < 1.05 * min(errors)


def test_groups_divide_the_dimensions():
    with pytest.raises(tersor.ConfigError, match="dim=5"):
        tersor.quantizer("hifi-codec", dim=5)
    method = type(tersor.quantizer("hifi-codec"))
    assert [str(m) for m in method.at_code_bits(12, 32)] == ["hifi-codec:codes=8,dim=32"]
    assert method.at_code_bits(12, 31) == []
    with pytest.raises(tersor.InputError, match="codes"):
        tersor.quantizer("hifi-codec", codes=3, dim=4).layer().codes_to_values(torch.tensor([[0, 1, 2, 3]]))
