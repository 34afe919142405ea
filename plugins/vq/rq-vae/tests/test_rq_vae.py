import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor.testing import assert_conforms
from tersor_kit_vq import kmeans
from tersor_rq_vae import RQTransformer


def vectors(count, dim, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def trained(codes=16, dim=4, depth=3, steps=20, **settings_):
    layer = tersor.quantizer("rq-vae", codes=codes, dim=dim, depth=depth, **settings_).layer()
    for i in range(steps):
        layer(vectors(200, dim, i))
    return layer.eval()


def test_conformance():
    assert_conforms("rq-vae", max_examples=3, fresh_process=False)


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 5), st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_each_code_is_the_nearest_to_the_residual(codes, dim, depth, seed):
    layer = tersor.quantizer("rq-vae", codes=codes, dim=dim, depth=depth).layer()
    layer(vectors(50, dim, seed + 1))
    x = vectors(20, dim, seed)
    words, left = layer.codebook.words.double(), x.double()
    out = layer.eval()(x)
    for d in range(depth):
        distances = torch.cdist(left, words)
        chosen = out.codes[:, d]
        torch.testing.assert_close(distances[torch.arange(20), chosen], distances.amin(1), rtol=1e-4, atol=1e-4)
        left = left - words[chosen]
    torch.testing.assert_close(out.values.double(), x.double() - left, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.codes_to_values(out.codes), out.values)


def test_the_loss_is_the_mean_over_partial_sums():
    layer = trained(commitment=0.5)
    x = vectors(30, 4).requires_grad_()
    out = layer(x)
    sums = layer.codebook.words[out.codes].cumsum(1)
    expected = 0.5 * torch.stack([(x.detach() - sums[:, d]).square().mean() for d in range(3)]).mean()
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    torch.testing.assert_close(x.grad, 0.5 * 2 * (x.detach()[:, None] - sums).mean(1) / x.numel())


def test_error_falls_with_depth_and_codes_come_back():
    x = vectors(500, 4, 99)
    errors = []
    for depth in (1, 2, 4):
        layer = trained(depth=depth)
        out = layer(x)
        errors.append(float((out.values - x).square().mean()))
        assert torch.equal(layer.codes_to_values(layer.values_to_codes(out.values)), out.values)
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.7 * errors[1]


def test_vectors_that_no_codes_stand_for_are_refused():
    layer = trained(depth=2)
    with pytest.raises(tersor.InputError, match="no sums of 2 codewords"):
        layer.values_to_codes(vectors(3, 4))


def test_dead_codewords_restart_at_residuals():
    layer = tersor.quantizer("rq-vae", codes=8, dim=2, depth=2).layer()
    layer.codebook.set(torch.cat([torch.zeros(1, 2), torch.full((7, 2), 1e6)]))
    layer.codebook.counts.fill_(0.5)
    layer(vectors(100, 2))
    assert float(layer.codebook.words.abs().max()) < 10
    kept = tersor.quantizer("rq-vae", codes=8, dim=2, depth=2, restart=False).layer()
    kept.codebook.set(torch.cat([torch.zeros(1, 2), torch.full((7, 2), 1e6)]))
    kept(vectors(100, 2))
    assert float(kept.codebook.words[1:].min()) > 1e5


@pytest.fixture(scope="module")
def prior():
    torch.manual_seed(0)
    layer = trained(codes=6, dim=3, depth=2)
    return layer, RQTransformer(layer, 2, 3, channels=16, heads=2, spatial=1, depth=1)


def test_the_prior_sees_only_what_is_before(prior):
    layer, network = prior
    codes = layer(vectors(12, 3).view(2, 2, 3, 3)).codes.flatten(1, 2)
    logits = network(codes)
    for t in range(6):
        for d in range(2):
            changed = codes.clone()
            changed[:, t, d] = (changed[:, t, d] + 1) % 6
            other = network(changed)
            before = torch.arange(12) <= 2 * t + d
            same = (other - logits).abs().amax((0, 3)).flatten() < 1e-5
            assert bool(same[before].all())
            if 2 * t + d < 11:
                assert not bool(same[~before].all())


def test_the_prior_learns_a_rule_and_samples_it(prior):
    layer, _ = prior
    base = layer.codebook.words[:, None, :].expand(6, 6, 3).reshape(6, 2, 3, 3)  # every position of a grid the same codeword
    torch.manual_seed(0)
    network = RQTransformer(layer, 2, 3, channels=32, heads=2, spatial=1, depth=1)
    codes = layer(base).codes
    before = network.bits(codes)
    network.fit([base], steps=120, batch=12, rate=3e-3)
    assert network.bits(codes) < 0.3 * before
    drawn = network.sample(20, seed=1)
    assert drawn.shape == (20, 2, 3, 2)
    assert torch.equal(drawn, network.sample(20, seed=1))
    same = (drawn == drawn[:, :1, :1]).all(3).float().mean()
    assert float(same) > 0.8


def test_soft_codes(prior):
    layer, network = prior
    x = vectors(4000, 3)
    hard, one_hot = network.soft_codes(x, 0.0)
    assert torch.equal(hard, layer(x).codes)
    assert torch.equal(one_hot.argmax(2), hard)
    torch.manual_seed(0)
    same = x[:1].expand(4000, 3)
    codes, soft = network.soft_codes(same, 1.0)
    expected = torch.softmax(-(x[:1] - layer.codebook.words).square().sum(1), 0)
    torch.testing.assert_close(soft[0, 0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.bincount(codes[:, 0], minlength=6) / 4000, expected, rtol=0, atol=0.03)


def test_what_the_prior_does_not_take(prior):
    layer, network = prior
    with pytest.raises(tersor.InputError, match="2 x 3 x 2"):
        network.bits(torch.zeros(1, 3, 2, 2, dtype=torch.int64))
    with pytest.raises(tersor.InputError, match="2 x 3 x 3"):
        network.fit([torch.zeros(1, 2, 3, 4)])
    with pytest.raises(tersor.ConfigError, match="heads"):
        RQTransformer(layer, 2, 2, channels=10, heads=4)
    with pytest.raises(tersor.ConfigError, match="decay"):
        tersor.quantizer("rq-vae", decay=0)


def test_codewords_of_many_depths_out_of_kmeans_come_back():
    from tersor_kit_vq import invert, residual_codes, residual_values

    x = vectors(300, 2)
    books = [kmeans(x, 32)[0] * 0.7**i for i in range(4)]
    values = residual_values(residual_codes(x, books), books)
    assert torch.equal(residual_values(invert(values, books), books), values)
