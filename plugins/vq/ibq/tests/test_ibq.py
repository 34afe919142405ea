import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor.testing import assert_conforms


def _vectors(count, dim, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def _paper(z, words, beta, entropy, temperature):
    """Algorithm 1 with the whole matrix, and the losses of the authors' code, in float64."""
    logits = z @ words.T
    p = logits.softmax(1)
    hard = torch.nn.functional.one_hot(p.argmax(1), len(words)).to(p)
    values, chosen = (hard - p.detach() + p) @ words, hard @ words
    loss = (values - z).square().mean() + (chosen.detach() - z).square().mean() + beta * (chosen - z.detach()).square().mean()
    q, log = (logits / temperature).softmax(1), (logits / temperature).log_softmax(1)
    mean = q.mean(0)
    penalty = -(q * log).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()
    return values, p.argmax(1), loss + entropy * penalty


def test_conformance():
    assert_conforms("ibq", max_examples=3, fresh_process=False)


@given(st.integers(1, 300), st.integers(1, 6), st.integers(1, 60), st.sampled_from([0.0, 0.05, 1.0]), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_layer_and_all_its_gradients_are_those_of_the_paper(codes, dim, count, entropy, seed):
    layer = tersor.quantizer("ibq", codes=codes, dim=dim, entropy=entropy, temperature=0.3, commitment=0.4, seed=seed).layer()
    z = _vectors(count, dim, seed).requires_grad_()
    values, indices, loss = layer(z)
    weights = _vectors(count, dim, seed + 1)
    ((values * weights).sum() + loss).backward()
    a, b = z.detach().double().requires_grad_(), layer.codebook.detach().double().requires_grad_()
    expected, chosen, total = _paper(a, b, 0.4, entropy, 0.3)
    ((expected * weights).sum() + total).backward()
    assert torch.equal(indices, chosen)
    assert torch.equal(values.detach(), layer.codebook.detach()[indices])
    torch.testing.assert_close(loss, total.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z.grad, a.grad.float(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(layer.codebook.grad, b.grad.float(), rtol=1e-3, atol=1e-5)


def test_one_vector_moves_every_codeword_where_a_plain_codebook_moves_one():
    layer = tersor.quantizer("ibq", codes=64, dim=8, entropy=0.0).layer()
    before = layer.codebook.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    values, _, loss = layer(_vectors(1, 8))
    (values.square().sum() + loss).backward()
    optimizer.step()
    assert bool(((layer.codebook.detach() - before).norm(dim=1) > 0).all())


def test_evaluation_has_no_entropy_penalty():
    layer = tersor.quantizer("ibq", codes=16, dim=4).layer()
    x = _vectors(50, 4)
    with torch.no_grad():
        trained, judged = layer.train()(x), layer.eval()(x)
    assert torch.equal(trained.values, judged.values)
    torch.testing.assert_close(judged.loss, 2.25 * (judged.values - x).square().mean())
    assert not torch.isclose(trained.loss, judged.loss)


def test_a_codeword_comes_back_as_itself_even_where_a_longer_one_has_a_larger_product():
    layer = tersor.quantizer("ibq", codes=2, dim=2).layer().eval()
    with torch.no_grad():
        layer.codebook.copy_(torch.tensor([[1.0, 0.0], [3.0, 0.1]]))
    values = layer.codes_to_values(torch.tensor([0, 1]))
    assert layer(values).codes.tolist() == [1, 1]
    assert layer.values_to_codes(values).tolist() == [0, 1]


def test_fit_brings_the_codebook_to_the_vectors():
    vectors = _vectors(1500, 4) * 2 + 1
    method = tersor.quantizer("ibq", codes=64, dim=4, steps=300)
    fitted = method.fit([vectors])
    untrained = method.with_state(method.layer().state_dict())
    error = [float((m.dequantize(m.quantize(vectors)) - vectors).square().mean()) for m in (fitted, untrained)]
    assert error[0] < 0.6 * error[1]
    assert fitted.quantize(vectors).nbytes < 1500 * 6 / 8 + 300
