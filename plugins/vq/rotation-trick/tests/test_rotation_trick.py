import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor.testing import assert_conforms


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_conformance():
    assert_conforms("rotation-trick", max_examples=3, fresh_process=False)


@given(st.integers(1, 40), st.integers(2, 9), st.integers(1, 60), st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_codeword_forward_and_the_papers_matrix_backward(codes, dim, count, seed):
    layer = tersor.quantizer("rotation-trick", codes=codes, dim=dim, seed=seed, commitment=0.5).layer()
    layer.codebook.set(normal(codes, dim, seed=seed + 1))
    words = layer.codebook.words.double().clone()
    x = normal(count, dim, seed=seed).requires_grad_()
    g = normal(count, dim, seed=seed + 2)
    values, indices, loss = layer(x)
    ((values * g).sum() + loss).backward()
    e = x.detach().double()
    distances = (e[:, None] - words).square().sum(-1)
    torch.testing.assert_close(distances[torch.arange(count), indices], distances.amin(1), rtol=1e-5, atol=1e-5)
    q = words[indices]
    assert torch.equal(values, q.float())
    torch.testing.assert_close(loss.double(), 0.5 * (e - q).square().mean(), check_dtype=False)
    for i in range(count):
        u, v = e[i] / e[i].norm(), q[i] / q[i].norm()
        w = (u + v) / (u + v).norm()
        matrix = q[i].norm() / e[i].norm() * (torch.eye(dim).double() - 2 * torch.outer(w, w) + 2 * torch.outer(v, u))
        torch.testing.assert_close(matrix @ e[i], q[i], rtol=1e-6, atol=1e-6)
        expected = matrix.T @ g[i].double() + 0.5 * 2 * (e[i] - q[i]) / (count * dim)
        torch.testing.assert_close(x.grad[i].double(), expected, rtol=1e-3, atol=1e-3 * float(expected.norm()))


def test_vectors_of_one_cell_get_different_gradients():
    layer = tersor.quantizer("rotation-trick", codes=2, dim=2, commitment=0.0).layer().eval()
    layer.codebook.set(torch.tensor([[2.0, 0.0], [-9.0, 0.0]]))
    x = torch.tensor([[2.0, 1.0], [2.0, -1.0], [1.0, 0.0]], requires_grad=True)
    values, codes, _ = layer(x)
    assert codes.tolist() == [0, 0, 0]
    (values * torch.tensor([0.0, 1.0])).sum().backward()
    # the gradient stays at right angles to the vector, and is as long as |q| / |e|
    torch.testing.assert_close((x.grad * x.detach()).sum(1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.grad.norm(dim=1), 2 / x.detach().norm(dim=1))
    torch.testing.assert_close(x.grad[2], torch.tensor([0.0, 2.0]))


def test_the_codebook_is_that_of_vq_vae():
    """Only the gradient of z differs: the same codes and moving averages, step for step."""
    ours = tersor.quantizer("rotation-trick", codes=16, dim=3).layer()
    theirs = tersor.quantizer("vq-vae", codes=16, dim=3, encoder="none", prior="none").layer()
    for step in range(5):
        x = normal(40, 3, seed=step)
        a, b = ours(x), theirs(x)
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.values, b.values)
        assert torch.equal(a.loss, b.loss)
    assert torch.equal(ours.codebook.words, theirs.codebook.words)


def test_a_codebook_loss_in_place_of_moving_averages():
    layer = tersor.quantizer("rotation-trick", codes=8, dim=3, decay=0.0, commitment=0.5).layer()
    x = normal(30, 3).requires_grad_()
    values, codes, loss = layer(x)
    (values.sum() * 0 + loss).backward()
    e = values.detach()
    expected = torch.zeros(8, 3).index_add_(0, codes, 2 * (e - x.detach()) / 90)
    torch.testing.assert_close(layer.codebook.words.grad, expected)
    torch.testing.assert_close(x.grad, 0.5 * 2 * (x.detach() - e) / 90)


def test_fit_brings_the_codebook_to_the_vectors():
    vectors = normal(2000, 8) * 3 + 1
    method = tersor.quantizer("rotation-trick", codes=256, dim=8, steps=60)
    fitted = method.fit([vectors])
    stored = fitted.quantize(vectors)
    error = float((fitted.dequantize(stored) - vectors).square().mean())
    drawn = vectors[:256]
    baseline = float((torch.cdist(vectors, drawn).amin(1).square() / 8).mean())
    assert error < 0.9 * baseline
    assert stored.nbytes < 2000 + 300
