import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor.testing import assert_conforms
from tersor_te_vq import orthogonality


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_conformance():
    assert_conforms("te-vq", max_examples=3, fresh_process=False)


@given(st.integers(1, 60), st.integers(1, 30), st.sampled_from([1e-3, 1.0, 1e3]))
@settings(deadline=None, max_examples=60)
def test_the_regulariser_is_the_papers_formula(codes, dim, scale):
    words = (vectors(codes, dim, seed=codes) * scale).requires_grad_()
    ours = orthogonality(words)
    exact = words.detach().double().requires_grad_()
    unit = exact / exact.norm(dim=1, keepdim=True)
    expected = (unit @ unit.T - torch.eye(codes, dtype=torch.float64)).square().sum() / codes**2
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-6)
    ours.backward()
    expected.backward()
    length = exact.detach().norm(dim=1, keepdim=True)  # short words have great gradients
    torch.testing.assert_close(words.grad.double() * length, exact.grad * length, rtol=1e-3, atol=1e-5)
    assert float(expected.detach()) >= 1 / dim - 1 / codes - 1e-9  # Welch


def test_right_angles_are_zero_and_zero_vectors_do_no_harm():
    assert float(orthogonality(torch.eye(5, 8) * 3)) < 1e-12
    zero = torch.zeros(6, 4, requires_grad=True)
    orthogonality(zero).backward()
    assert bool(torch.isfinite(zero.grad).all())


def test_loss_and_gradients_by_hand():
    layer = tersor.quantizer("te-vq", codes=6, dim=4, weight=2.0, commitment=0.5, start="kmeans").layer()
    layer(vectors(50, 4))
    x = vectors(10, 4, seed=1).requires_grad_()
    weights = vectors(10, 4, seed=2)
    values, codes, loss = layer(x)
    words = layer.codebook.words.detach()
    assert torch.equal(codes, torch.cdist(x.detach(), words).argmin(1))
    assert torch.equal(values, words[codes])
    expected = 1.5 * (words[codes] - x.detach()).square().mean() + 2.0 * orthogonality(words)
    torch.testing.assert_close(loss.detach(), expected)
    ((values * weights).sum() + loss).backward()
    error = words[codes] - x.detach()
    torch.testing.assert_close(x.grad, weights - 0.5 * 2 * error / 40)
    free = words.clone().requires_grad_()
    (2.0 * orthogonality(free)).backward()
    by_hand = torch.zeros(6, 4).index_add_(0, codes, 2 * error / 40) + free.grad
    torch.testing.assert_close(layer.codebook.words.grad, by_hand, rtol=1e-4, atol=1e-6)


def test_training_turns_codewords_to_right_angles():
    x = vectors(1500, 16) + 1.0
    found = {}
    for weight in (0.0, 10.0):
        method = tersor.quantizer("te-vq", codes=8, dim=16, weight=weight, steps=200).fit([x])
        found[weight] = float(orthogonality(method.layer(fitted=True).codebook.words.detach()))
    assert found[10.0] < 0.01
    assert found[10.0] < 0.5 * found[0.0]


def test_a_large_codebook_makes_no_square_matrix():
    layer = tersor.quantizer("te-vq", codes=1 << 17, dim=4).layer()  # 68 GB if it were squared
    _, codes, loss = layer(vectors(5, 4))
    loss.backward()
    assert codes.shape == (5,)
    assert float(loss.detach()) > 0


def test_starts():
    uniform = tersor.quantizer("te-vq", codes=64, dim=8).layer().codebook.words
    assert float(uniform.detach().abs().max()) <= 1 / 64
    x = vectors(500, 8) * 5
    _, codes, _ = tersor.quantizer("te-vq", codes=64, dim=8, start="kmeans").layer()(x)
    assert len(codes.unique()) > 50
    with pytest.raises(tersor.ConfigError, match="start"):
        tersor.quantizer("te-vq", start="middle")
