import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import tersor
from tersor.testing import assert_conforms


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_conformance():
    assert_conforms("dkvb", max_examples=3, fresh_process=False)


@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 6), st.integers(0, 30), st.sampled_from(["gaussian", "orthogonal"]))
@settings(deadline=None, max_examples=30)
def test_heads_take_the_nearest_keys_and_values_are_averaged(codes, heads, dim, count, projection):
    layer = tersor.quantizer("dkvb", codes=codes, heads=heads, dim=dim, key_dim=3, projection=projection).layer().eval()
    torch.nn.init.normal_(layer.values, generator=torch.Generator().manual_seed(1))
    x = vectors(count, dim)
    values, indices, loss = layer(x)
    books, expected = layer.values.detach().view(heads, codes, dim), torch.zeros(count, dim)
    for c in range(heads):
        own = x.double() @ layer.keys.projection.double()[3 * c : 3 * c + 3].T
        distances = (own[:, None] - layer.keys.keys[c].double()).square().sum(-1)
        torch.testing.assert_close(distances.gather(1, indices[:, c : c + 1])[:, 0], distances.amin(1), rtol=1e-4, atol=1e-5)
        expected += books[c][indices[:, c]] / heads
    torch.testing.assert_close(values, expected)
    assert indices.shape == (count, heads)
    torch.testing.assert_close(loss, 1.25 * (expected - x).square().mean() if count else torch.tensor(0.0))


def test_keys_are_moving_averages_then_frozen():
    layer = tersor.quantizer("dkvb", codes=4, heads=2, dim=6, decay=0.9, expire=0.0, key_steps=3).layer()
    keys, counts, sums = (layer.keys.keys.double(), torch.zeros(2, 4).double(), torch.zeros(2, 4, 3).double())
    for step in range(5):
        x = vectors(50, 6, seed=step)
        own = (x @ layer.keys.projection.T).view(50, 2, 3)
        _, codes, _ = layer(x)
        if step < 3:
            for c in range(2):
                hot = functional.one_hot(codes[:, c], 4).double()
                counts[c] = 0.9 * counts[c] + 0.1 * hot.sum(0)
                sums[c] = 0.9 * sums[c] + 0.1 * hot.T @ own[:, c].double()
            total = counts.sum(1, keepdim=True)
            keys = sums / ((counts + 1e-5) / (total + 4e-5) * total)[..., None]
        torch.testing.assert_close(layer.keys.keys, keys.float(), rtol=1e-4, atol=1e-5)
    assert int(layer.keys.left) == 0


def test_a_key_that_nobody_needs_takes_a_vector_of_the_batch():
    layer = tersor.quantizer("dkvb", codes=16, heads=1, dim=3, key_steps=40).layer()
    layer.keys.keys[0, 8:] += 1e3
    x = vectors(400, 3)
    for _ in range(40):
        layer(x)
    assert len(layer.eval()(x).codes.unique()) == 16
    assert float(layer.keys.keys.abs().max()) < 6


def test_before_learning_values_are_what_the_keys_say():
    for combine in ("average", "concat"):
        layer = tersor.quantizer("dkvb", codes=64, heads=2, dim=4, projection="orthogonal", combine=combine, key_steps=30).layer()
        for step in range(30):
            layer(vectors(500, 4, seed=step))
        x = vectors(300, 4, seed=99)
        values, codes, _ = layer.eval()(x)
        chosen = torch.cat([layer.keys.keys[c][codes[:, c]] for c in range(2)], 1)
        if combine == "average":  # at right angles: the keys turned back
            torch.testing.assert_close(values, chosen @ layer.keys.projection, rtol=1e-4, atol=1e-5)
            assert float((values.detach() - x).square().mean()) < 0.1
        else:
            each = [chosen[:, 2 * c : 2 * c + 2] @ layer.keys.projection[2 * c : 2 * c + 2, 2 * c : 2 * c + 2] for c in range(2)]
            torch.testing.assert_close(values, torch.cat(each, 1), rtol=1e-4, atol=1e-5)


def test_gradients_of_the_layer():
    layer = tersor.quantizer("dkvb", codes=8, heads=1, dim=4, commitment=0.5).layer()
    layer.keys.freeze()
    x = vectors(10, 4).requires_grad_()
    weights = vectors(10, 4, seed=1)
    values, codes, loss = layer(x)
    ((values * weights).sum() + loss).backward()
    error = values.detach() - x.detach()
    torch.testing.assert_close(x.grad, weights - 0.5 * 2 * error / 40)
    expected = torch.zeros(8, 4).index_add_(0, codes[:, 0], weights + 2 * error / 40)
    torch.testing.assert_close(layer.values.grad, expected)


@pytest.mark.parametrize("combine", ["average", "concat"])
def test_the_bottleneck_learns_only_what_it_fetched(combine):
    layer = tersor.quantizer("dkvb", codes=32, heads=3, dim=6, combine=combine).layer()
    layer(vectors(100, 6))
    before = layer.keys.keys.clone()
    grads = []
    for sparse in (False, True):
        bottleneck = layer.bottleneck(5, sparse)
        z = vectors(2, 3, 6).requires_grad_()
        values, codes, loss = bottleneck(z)
        assert values.shape == (2, 3, 5 if combine == "average" else 15)
        assert codes.shape == (2, 3, 3)
        assert float(loss) == 0
        torch.testing.assert_close(bottleneck.look_up(codes), values)
        values.sum().backward()
        assert z.grad is None
        grads.append(bottleneck.values.grad)
    assert grads[1].is_sparse
    torch.testing.assert_close(grads[1].to_dense(), grads[0])
    fetched = torch.zeros(3, 32, dtype=torch.bool)
    for c in range(3):
        fetched[c, codes[..., c].reshape(-1)] = True
    assert torch.equal(grads[0].abs().sum(1) > 0, fetched.view(-1))
    layer.train()(vectors(100, 6, seed=5))
    assert torch.equal(layer.keys.keys, before)


def test_two_classes_after_two_others_are_not_forgotten():
    centres = 4 * torch.eye(4, 8)
    x = (centres[:, None] + vectors(4, 100, 8)).flatten(0, 1)
    y = torch.arange(4).repeat_interleave(100)
    layer = tersor.quantizer("dkvb", codes=16, heads=16, dim=8, key_dim=4, key_steps=20).layer()
    for _ in range(20):
        layer(x)
    bottleneck = layer.bottleneck(4)
    optimizer = torch.optim.SGD(bottleneck.parameters(), 1.0)
    for stage in (slice(0, 200), slice(200, 400)):
        for _ in range(30):
            optimizer.zero_grad()
            functional.cross_entropy(bottleneck(x[stage]).values, y[stage]).backward()
            optimizer.step()
    right = bottleneck(x).values.argmax(1) == y
    assert float(right[:200].float().mean()) > 0.9
    assert float(right.float().mean()) > 0.9


def test_fit_and_typed_errors():
    x = vectors(1000, 8)
    method = tersor.quantizer("dkvb", codes=16, heads=2, dim=8, projection="orthogonal", key_steps=50, steps=200)
    fitted = method.fit([x])
    error = float((fitted.dequantize(fitted.quantize(x)) - x).square().mean())
    assert error < 0.6
    assert fitted.quantize(x).nbytes < 1000 + 300
    with pytest.raises(tersor.ConfigError, match="multiple of heads=3"):
        tersor.quantizer("dkvb", heads=3, dim=8, combine="concat")
    with pytest.raises(tersor.InputError, match="8 dimensions"):
        method.layer().bottleneck(3)(torch.zeros(2, 7))


_RANK = """
layer = tersor.quantizer("dkvb", codes=9, heads=2, dim=4, key_steps=6).layer()
torch.manual_seed(rank)
for step in range(8):
    layer(torch.randn((20, 0)[(rank + step) % 2] if step % 3 else 12, 4) + rank)
out = {k: v for k, v in layer.state_dict().items()}
"""


def test_all_processes_keep_the_same_keys(in_two_processes):
    first, second = in_two_processes(_RANK)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert int(first["keys.left"]) == 0
