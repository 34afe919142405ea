import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor.testing import assert_conforms


def test_conformance():
    assert_conforms("simvq", max_examples=3, fresh_process=False)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 60), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_codes_are_the_nearest_images_of_the_basis(codes, dim, count, seed):
    layer = tersor.quantizer("simvq", codes=codes, dim=dim, seed=seed).layer()
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    values, indices, loss = layer(x)
    words = layer.basis.double() @ layer.linear.weight.double().T
    distances = (x.double()[:, None] - words).square().sum(-1)
    torch.testing.assert_close(distances[torch.arange(count), indices], distances.amin(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values, words[indices].float())
    expected = 1.25 * (values - x).square().mean() if count else torch.tensor(0.0)
    torch.testing.assert_close(loss, expected)


def test_one_step_moves_every_codeword_and_the_basis_never():
    layer = tersor.quantizer("simvq", codes=64, dim=8).layer()
    basis, before = layer.basis.clone(), layer.codebook.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    _, indices, loss = layer(x)
    loss.backward()
    optimizer.step()
    moved = (layer.codebook.detach() - before).norm(dim=1)
    assert len(indices.unique()) <= 3
    assert bool((moved > 0).all())
    assert torch.equal(layer.basis, basis)
    assert [n for n, _ in layer.named_parameters()] == ["linear.weight"]


def test_gradients_are_those_of_the_two_losses():
    layer = tersor.quantizer("simvq", codes=32, dim=4, commitment=0.5).layer()
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    values, indices, loss = layer(x)
    weights = torch.randn(10, 4, generator=torch.Generator().manual_seed(2))
    ((values * weights).sum() + loss).backward()
    e = values.detach()
    torch.testing.assert_close(x.grad, weights + 0.5 * 2 * (x.detach() - e) / 40)
    torch.testing.assert_close(layer.linear.weight.grad, (2 * (e - x.detach()) / 40).T @ layer.basis[indices])


def test_fit_brings_the_codebook_to_the_vectors():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2000, 8, generator=generator) * 3 + 1
    method = tersor.quantizer("simvq", codes=256, dim=8, steps=300)
    fitted = method.fit([vectors])
    untrained = method.with_state(method.layer().state_dict())
    error = [float((m.dequantize(m.quantize(vectors)) - vectors).square().mean()) for m in (fitted, untrained)]
    assert error[0] < 0.6 * error[1]
    assert fitted.quantize(vectors).nbytes < 2000 + 300
