import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor.evidence import data
from tersor.testing import assert_conforms
from tersor_kit_vq import grid_shape


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(**settings):
    return tersor.quantizer("vq-vae", **{"codes": 11, "dim": 4, "encoder": "none", "steps": 30, **settings})


def test_conformance():
    assert_conforms("vq-vae", fresh_process=False)


@given(st.sampled_from(["none", "order0", "autoregressive"]), st.sampled_from([1, 2, 5, 16, 100]),
       st.sampled_from([(1,), (3,), (64,), (130,), (3, 5), (2, 4, 6), (1, 1, 1, 2)]), st.integers(0, 1000))  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_files_hold_the_nearest_codewords(prior, codes, shape, seed):
    vq = small(codes=codes, prior=prior, steps=3).fit([vectors(7, 9, 4, seed=seed)])
    x = vectors(*shape, 4, seed=seed + 1)
    words = vq.state["codebook"]
    expected = words[torch.cdist(x.double().view(-1, 4), words.double()).argmin(1)].view(x.shape)
    got = vq.dequantize(vq.quantize(x))
    assert torch.equal(got, expected)


def test_the_layer_is_equations_1_to_3():
    layer = small(decay=0, commitment=0.25).layer("random")
    layer.codebook.set(vectors(11, 4))
    z = vectors(2, 5, 4, seed=1).requires_grad_()
    values, codes, loss = layer(z)
    words = layer.codebook.words
    distances = (z.detach()[..., None, :] - words.detach()).square().sum(-1)
    assert torch.equal(codes, distances.argmin(-1))
    assert torch.equal(values, words.detach()[codes])
    out = vectors(2, 5, 4, seed=2)
    ((values * out).sum() + loss).backward()
    e = words.detach()[codes]
    # straight through, and beta times the gradient of the commitment loss
    torch.testing.assert_close(z.grad, out + 0.25 * 2 * (z.detach() - e) / z.numel())
    expected = torch.zeros(11, 4).index_add_(0, codes.view(-1), (2 * (e - z.detach()) / z.numel()).view(-1, 4))
    torch.testing.assert_close(words.grad, expected)
    torch.testing.assert_close(loss, 1.25 * (z - e).square().mean())


def test_training_mode_moves_the_codebook_and_evaluation_does_not():
    layer = small().layer()
    z = vectors(300, 4)
    layer(z)
    first = layer.codebook.words.clone()
    # k-means of the first batch, then averages
    assert float((z - layer.eval()(z).values).square().mean()) < 0.5 * float(z.var())
    assert torch.equal(layer.codebook.words, first)
    assert torch.equal(layer(z).values, layer(z).values)
    layer.train()
    layer(z + 1)
    assert not torch.equal(layer.codebook.words, first)
    copy = small().layer()
    copy.load_state_dict(layer.state_dict())
    assert torch.equal(copy.eval()(z).codes, layer.eval()(z).codes)
    with pytest.raises(tersor.StateError, match=r"codebook.words: \(11, 4\), not \(12, 4\)"):
        small(codes=12).layer().load_state_dict(layer.state_dict())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(kind):
    layer = small().layer()
    layer(vectors(200, 4))
    layer.eval()
    z = vectors(30, 4, seed=1).to(kind).requires_grad_()
    values, codes, loss = layer(z)
    assert values.dtype == kind
    assert loss.dtype == torch.float32
    plain = layer(z.float())
    assert torch.equal(codes, plain.codes)
    assert torch.equal(values, plain.values.to(kind))
    values.float().sum().backward()
    assert z.grad.dtype == kind
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(z.detach().float())
    assert torch.equal(inside.codes, plain.codes)
    assert torch.equal(inside.loss, plain.loss)
    half = vectors(30, 4, seed=1).half().numpy()
    vq = small(prior="none").with_codebook(layer.codebook.words)
    assert vq.dequantize(vq.quantize(half)).dtype == torch.float16


def test_any_batch_one_vector_and_none():
    layer = small().layer()
    assert layer(torch.empty(0, 4)).codes.shape == (0,)
    assert layer(vectors(1, 4)).values.shape == (1, 4)  # more codes than vectors at the start
    assert layer(vectors(4)).codes.shape == ()
    out = layer(torch.empty(3, 0, 4, requires_grad=True))
    assert out.values.shape == (3, 0, 4)
    assert out.loss == 0
    out.loss.backward()
    assert layer.codebook.words.isfinite().all()
    x = vectors(5, 3, 2, 4)
    layer.eval()
    assert torch.equal(layer(x).values[2], layer(x[2]).values)
    assert torch.equal(layer(x.movedim(0, 1)).codes, layer(x).codes.movedim(0, 1))


def test_errors_say_what_is_allowed():
    layer = small().layer()
    with pytest.raises(tersor.InputError, match="float vectors of 4 dimensions; given: float32 of shape \\(2, 5\\)"):
        layer(torch.zeros(2, 5))
    for bad in (torch.nan, torch.inf):
        with pytest.raises(tersor.InputError, match="without NaN or infinity"):
            layer(torch.tensor([[0.0, 1.0, bad, 0.0]]))
    assert not layer.codebook.started
    vq = small(prior="none").fit([vectors(20, 4)])
    with pytest.raises(tersor.InputError, match="dim=4 dimensions; given: 3"):
        vq.quantize(np.zeros((5, 3), np.float32))
    with pytest.raises(tersor.InputError, match='encoder="none" takes latents; given: an image'):
        vq.quantize(np.zeros((3, 8, 8), np.float32), domain="image")
    with pytest.raises(tersor.MissingStateError, match="no fitted state"):
        small().quantize(np.zeros((5, 4), np.float32))
    with pytest.raises(tersor.MissingStateError, match="fitted on latents"):
        small(encoder="conv", prior="none").fit([vectors(20, 4)]).quantize(np.zeros((3, 8, 8), np.float32))
    with pytest.raises(tersor.MissingStateError, match="the state has no prior"):
        small().with_codebook(vectors(11, 4)).quantize(np.zeros((5, 4), np.float32))
    with pytest.raises(tersor.StateError, match="needs a codebook of 11 x 4; the state has \\(12, 4\\)"):
        small().with_codebook(vectors(12, 4))
    with pytest.raises(tersor.ConfigError, match="start"):
        small().layer("zeros")
    with pytest.raises(tersor.InputError, match="images or latents, not both"):
        small(encoder="conv").fit([vectors(20, 4), torch.rand(3, 16, 16)])
    with pytest.raises(tersor.InputError, match="1 or 3 channels; given: 4"):
        tersor.quantizer("vq-vae").quantize(np.zeros((4, 16, 16), np.float32), domain="image")


def test_a_state_of_another_shape(tmp_path):
    small(prior="none").fit([vectors(50, 4)]).save(tmp_path / "state.safetensors")
    other = small(prior="none", codes=12).load(tmp_path / "state.safetensors")
    with pytest.raises(tersor.StateError, match="needs a codebook of 12 x 4; the state has \\(11, 4\\)"):
        other.quantize(np.zeros((5, 4), np.float32))
    images = tersor.quantizer("vq-vae")
    broken = images.with_state({k: v[:-1] if k == "network.encoder.2.weight" else v for k, v in images.state.items()})
    with pytest.raises(tersor.StateError, match="no state of vq-vae"):
        broken.quantize(np.zeros((3, 16, 16), np.float32))


def test_a_sequence_of_any_length_has_short_rows():
    vq = small(steps=3).fit([vectors(300, 4)])
    for count in (1, 63, 64, 65, 127, 1000, 16385):
        rows, height, width = grid_shape((count,))
        assert height == 1
        assert width <= 64
        assert count <= rows * width < count + rows
    x = vectors(1001, 4, seed=1)
    assert torch.equal(vq.dequantize(vq.quantize(x)), vq.layer(fitted=True).eval()(x).values)


def test_the_shipped_state_takes_photographs():
    vq = tersor.quantizer("vq-vae")
    x = data.photographs()["coffee"][:, 100:211, 50:173]  # no multiples of 4
    codes = vq.quantize(x)
    back = tersor.decompress(codes.to_bytes())
    assert back.shape == x.shape
    assert codes.spec.domain == "image"
    packed = tersor.quantizer("vq-vae", prior="none").quantize(x)
    assert np.array_equal(np.asarray(tersor.decompress(packed.to_bytes())), np.asarray(back))
    assert codes.nbytes < packed.nbytes
    assert float(np.square(np.asarray(back) - x).mean()) < 0.01
    grey = vq.dequantize(vq.quantize(x[:1]))
    assert grey.shape == x[:1].shape
    assert vq.dequantize(vq.quantize(x[:, :1, :1])).shape == (3, 1, 1)
    assert not vq.bitwise
    assert small().bitwise


def test_images_are_told_from_latents():
    vq = tersor.quantizer("vq-vae", prior="none")
    x = np.random.default_rng(0).random((3, 5, 64), np.float32)
    assert vq.quantize(x).spec.domain == "image"
    assert vq.quantize(x, domain="latent").spec.domain == "latent"
    assert vq.quantize(x[0]).spec.domain == "latent"


def test_fitting_again_gives_the_same_state():
    photo = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 9), size=(40, 40), mode="bilinear")[0]
    first, second = (small(encoder="conv", steps=3).fit([photo]) for _ in range(2))
    assert first.state_id == second.state_id
    assert first.layer(fitted=True).codebook.words.equal(first.state["codebook"])


_WORKER = """
layer = tersor.quantizer("vq-vae", codes=11, dim=4, encoder="none").layer()
for step in range(3):
    layer(torch.randn(40, 4, generator=torch.Generator().manual_seed(10 * step + rank)))
out = layer.codebook.words
"""


def test_all_processes_keep_one_codebook(in_two_processes):
    first, second = in_two_processes(_WORKER)
    assert torch.equal(first, second)
    # as one process with both halves, started from the first's
    layer = small().layer()
    layer.codebook.prepare(vectors(40, 4, seed=0))
    for step in range(3):
        layer(torch.cat([vectors(40, 4, seed=10 * step + rank) for rank in range(2)]))
    torch.testing.assert_close(first, layer.codebook.words, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("leading", [(100_000, 1), (1, 100_000), (5, 3000, 2), (200, 1, 300), (25_000, 4)])
def test_long_narrow_grids_take_few_steps(leading, monkeypatch):
    vq = small(steps=3).fit([vectors(7, 9, 4)])
    calls = []
    inner = type(vq._prior).probabilities
    monkeypatch.setattr(type(vq._prior), "probabilities", lambda self, w: calls.append(len(w)) or inner(self, w))
    spec = tersor.Spec("latent", (*leading, 4), "float32")
    vq._dequantize({"codes": b""}, spec)  # of no bytes the range decoder makes any number of indices
    assert len(calls) <= 64
    x = vectors(*leading[:-2], -(-leading[-2] // 20), -(-leading[-1] // 20), 4)
    words = vq.state["codebook"]
    nearest = words[torch.cdist(x.double().view(-1, 4), words.double()).argmin(1)]
    assert torch.equal(vq.dequantize(vq.quantize(x)).view(-1, 4), nearest)


def test_which_grids_stay_grids():
    for leading in ((32, 32), (3, 128, 192), (43, 1), (1, 128), (7, 100, 1600), (2, 5)):
        assert grid_shape(leading) == (int(np.prod(leading[:-2])), *leading[-2:])
    assert grid_shape((1000, 1)) == (16, 1, 63)
    assert grid_shape((2, 100, 1601)) == grid_shape((320_200,))
