import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor.testing import assert_conforms
from tersor_fqgan.claims import orientations


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def test_conformance():
    assert_conforms("fqgan", max_examples=3, fresh_process=False)


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, 12),
    st.integers(0, 30),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_each_factor_takes_its_nearest_codeword_on_the_sphere(sizes, factor, dim, count, seed):
    layer = tersor.quantizer("fqgan", codes=tuple(sizes), dim=dim, factor=factor, seed=seed).layer()
    assert layer.sizes == tuple(sizes)
    x = vectors(count, dim, seed=seed)
    values, codes, loss = layer(x)
    assert codes.shape == (count, len(sizes))
    parts = (x.double() @ layer.project_in.weight.double().T + layer.project_in.bias.double()).split(factor, 1)
    chosen = []
    for i, part in enumerate(parts):
        words = unit(layer.books[i].double())
        products = unit(part) @ words.T
        torch.testing.assert_close(products.gather(1, codes[:, i, None])[:, 0], products.amax(1), rtol=1e-4, atol=1e-5)
        chosen.append(words[codes[:, i]])
    expected = torch.cat(chosen, 1) @ layer.project_out.weight.double().T + layer.project_out.bias.double()
    torch.testing.assert_close(values, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.factors(codes), torch.stack(chosen, 1).float(), rtol=1e-4, atol=1e-5)
    assert loss.isfinite()


def test_the_loss_is_the_sum_of_the_parts_of_the_paper():
    layer = tersor.quantizer("fqgan", codes=(6, 9, 4), dim=8, factor=4, commitment=0.4, entropy=0.2, disentangle=0.7).layer()
    x, weights = vectors(30, 8).requires_grad_(), vectors(30, 8, seed=1)
    values, codes, loss = layer(x)
    (loss + (values * weights).sum()).backward()
    r = x.detach().double().requires_grad_()
    books = [b.detach().double().requires_grad_() for b in layer.books]
    w, c = layer.project_in.weight.detach().double(), layer.project_in.bias.detach().double()
    expected, through = 0.0, []
    for i, part in enumerate((r @ w.T + c).split(4, 1)):
        z, words = unit(part), unit(books[i])
        e = words[codes[:, i]]
        p = (2 * z @ words.T / 0.01).softmax(1)
        mean = p.mean(0)
        entropy = torch.special.entr(p).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()
        expected = expected + (e - z.detach()).square().mean() + 0.4 * (z - e.detach()).square().mean() + 0.2 * entropy
        through.append(z + (e - z).detach())
    cosines = [(through[a] * through[b]).sum(1).square().mean() for a, b in ((0, 1), (0, 2), (1, 2))]
    expected = expected + 0.7 * sum(cosines) / 3
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.redundancy(codes).double(), sum(cosines) / 3, rtol=1e-4, atol=1e-6)
    out = torch.cat(through, 1) @ layer.project_out.weight.detach().double().T
    (expected + (out * weights).sum()).backward()
    torch.testing.assert_close(x.grad.double(), r.grad, rtol=1e-2, atol=1e-3)
    for ours, theirs in zip(layer.books, books, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-2, atol=1e-3)


def test_alignment_is_the_cosine_to_the_teacher_and_teaches_its_factor_alone():
    layer = tersor.quantizer("fqgan", codes=(16, 16), dim=6, factor=3, features=(5,), alignment=2.0).layer()
    z, features = vectors(2, 10, 6).requires_grad_(), vectors(2, 10, 5, seed=1)
    loss = layer.align(z, features)
    codes = layer(z).codes.reshape(-1, 2)
    guess = layer.heads[0](layer.factors(codes)[:, 0])
    expected = 2 * (1 - torch.nn.functional.cosine_similarity(guess, features.view(-1, 5))).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    rows = layer.project_in.weight.grad.abs().sum(1)
    assert bool((rows[:3] > 0).all())
    assert not bool(rows[3:].any())
    assert bool(z.grad.any())
    # by steps on this loss the factor comes to tell the features
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        taught = layer.align(z.detach(), z.detach()[..., :5])
        taught.backward()
        optimizer.step()
    assert float(taught.detach()) < 0.7 * float(layer.alignment)
    for wrong in ((), (features[..., :4],), (features, features), (features[:1],)):
        with pytest.raises(tersor.InputError, match=r"with t in \(5,\); given"):
            layer.align(z, *wrong)
    with pytest.raises(tersor.InputError, match="without NaN"):
        layer.align(z, features * torch.nan)
    with pytest.raises(tersor.InputError, match="given"):
        tersor.quantizer("fqgan", codes=(4, 4), dim=6).layer().align(z)


def test_the_regulariser_parts_the_factors():
    x = vectors(400, 8)
    found = {}
    for weight in (0.0, 5.0):
        layer = tersor.quantizer("fqgan", codes=(16, 16), dim=8, factor=4, disentangle=weight).layer()
        optimizer = torch.optim.Adam(layer.parameters(), 0.01)
        for _ in range(80):
            out = layer(x)
            optimizer.zero_grad()
            ((out.values - x).square().mean() + out.loss).backward()
            optimizer.step()
        found[weight] = float(layer.redundancy(layer(x).codes))
    assert found[5.0] < 0.7 * found[0.0]


def test_settings_and_files():
    with pytest.raises(tersor.ConfigError, match="features for at most as many"):
        tersor.quantizer("fqgan", codes=(4,), features=(2, 2))
    assert tersor.quantizer("fqgan").at_code_bits(13, 32)[0].layer().bits == 13
    assert tersor.quantizer("fqgan", codes=(4, 4), dim=7).layer().invertible is False
    x = vectors(300, 8)
    fitted = tersor.quantizer("fqgan", codes=(10, 6), dim=8, factor=4, steps=50).fit([x])
    packed = fitted.quantize(x)  # 60 codes: 6 bits
    assert torch.equal(fitted.dequantize(packed), fitted.layer(fitted=True)(x).values)
    bare = tersor.quantizer("fqgan", codes=(16, 16), dim=8, factor=4, steps=1).fit([x]).quantize(x)
    assert bare.nbytes - packed.nbytes >= 300 * 2 // 8 - 40


def test_orientations_know_edges():
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8:] = 1  # an upright edge: gradients to the right
    upright, lying = orientations(image), orientations(image.transpose(2, 3))
    assert upright.shape == (1, 4, 4, 72)
    cells = upright[0, 1, 2].view(8, 9)
    assert int(cells.sum(1).argmax()) == 0
    assert int(lying[0, 2, 1].view(8, 9).sum(1).argmax()) == 4
    assert not bool(upright[0, :, 0, :].view(4, 8, 9)[..., 4].any())  # no gradient in the middle cell of the first column
    assert float(upright.norm(dim=-1).max()) <= 1 + 1e-5
