import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor.testing import assert_conforms
from tersor_kit_vq import nearest


def _vectors(count, dim, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_conformance():
    assert_conforms("vqgan-lc", max_examples=3, fresh_process=False)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 6), st.integers(1, 60), st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_layer_and_gradients_are_those_of_the_two_losses(codes, dim, wide, count, seed):
    method = tersor.quantizer("vqgan-lc", codes=codes, dim=dim, feature_dim=wide, commitment=0.7, weight=0.2, seed=seed)
    layer = method.layer(start=_vectors(50, wide, seed))
    x = _vectors(count, dim, seed + 1).requires_grad_()
    values, indices, loss = layer(x)
    weights = _vectors(count, dim, seed + 2)
    ((values * weights).sum() + loss).backward()
    features, projector = layer.features.words.double(), layer.projector
    words = features @ projector.weight.detach().double().T + projector.bias.detach()
    distances = (x.detach().double()[:, None] - words).square().sum(-1)
    torch.testing.assert_close(distances[torch.arange(count), indices], distances.amin(1), rtol=1e-5, atol=1e-5)
    chosen, error = words[indices], x.detach().double() - words[indices]
    torch.testing.assert_close(values.detach(), chosen.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, (0.9 * error.square().mean()).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, weights + (1.4 * error / error.numel()).float(), rtol=1e-4, atol=1e-5)
    slope = -0.4 * error / error.numel()
    torch.testing.assert_close(projector.weight.grad, (slope.T @ features[indices]).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(projector.bias.grad, slope.sum(0).float(), rtol=1e-4, atol=1e-5)


def test_one_step_moves_every_codeword_and_the_features_never():
    layer = tersor.quantizer("vqgan-lc", codes=64, dim=8).layer(start=_vectors(500, 8))
    features, before = layer.features.words.clone(), layer.codebook.detach().clone()
    assert not layer.features.words.requires_grad
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], 0.1)
    _, indices, loss = layer(_vectors(3, 8, 1))
    loss.backward()
    optimizer.step()
    assert len(indices.unique()) <= 3
    assert bool(((layer.codebook.detach() - before).norm(dim=1) > 0).all())
    assert torch.equal(layer.features.words, features)


def test_features_are_centres_of_what_is_given():
    corners = torch.tensor([[0.0, 0], [0, 9], [9, 0], [9, 9]])
    given_features = (corners[:, None] + 0.1 * _vectors(100, 2).view(4, 25, 2)).view(4, 25, 2)  # any leading shape
    layer = tersor.quantizer("vqgan-lc", codes=4, dim=3, feature_dim=2).layer(start=given_features)
    centres = layer.features.words
    assert sorted(nearest(corners, centres).tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(centres[nearest(corners, centres)], given_features.mean(1), rtol=0, atol=1e-5)
    assert layer.features.started


def test_without_features_the_first_batch_has_them_all_different():
    layer = tersor.quantizer("vqgan-lc", codes=500, dim=4).layer()
    x = _vectors(100, 4)
    layer(x[:0])
    assert not layer.features.started
    values = layer(x).values
    torch.testing.assert_close(values, x, rtol=0, atol=1e-5)  # each vector is a feature, and the projector is the identity
    words = layer.codebook.detach()
    assert len(words.unique(dim=0)) == 500
    assert bool((words.amin(0) >= x.amin(0) - 1e-5).all() and (words.amax(0) <= x.amax(0) + 1e-5).all())
    before = layer.features.words.clone()
    layer(_vectors(100, 4, 1))
    assert torch.equal(layer.features.words, before)


def test_features_that_do_not_fit():
    method = tersor.quantizer("vqgan-lc", codes=4, dim=3, feature_dim=2)
    with pytest.raises(tersor.InputError, match="2 dimensions"):
        method.layer(start=_vectors(10, 3))
    with pytest.raises(tersor.InputError, match=r"one feature or more; given: shape \(0, 2\)"):
        method.layer(start=_vectors(0, 2))
    with pytest.raises(tersor.InputError, match="NaN"):
        method.layer(start=_vectors(10, 2) * torch.nan)
    with pytest.raises(tersor.ConfigError, match=r"layer\(start=features\)"):
        method.layer()(_vectors(10, 3))
    with pytest.raises(tersor.ConfigError, match=r"layer\(start=features\)"):
        method.fit([_vectors(10, 3)])


def test_fit_brings_the_codebook_to_the_vectors():
    vectors = _vectors(2000, 4) * 3 + 1
    method = tersor.quantizer("vqgan-lc", codes=128, dim=4, steps=100)
    fitted = method.fit([vectors])
    coded = fitted.quantize(vectors)
    centres = vectors[:128]
    plain = float((centres[nearest(vectors, centres)] - vectors).square().mean())
    assert float((fitted.dequantize(coded) - vectors).square().mean()) < 0.8 * plain
    assert coded.nbytes < 2000 * 7 / 8 + 300
