import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor.testing import assert_conforms
from tersor_walloc import WaLLoC
from tersor_walloc.coder import LatentCoder, fit_coder
from tersor_walloc.network import HALF, LIMIT, compress, expand
from tersor_walloc.training import fit_network
from tersor_walloc.wavelet import analysis, split, synthesis

torch.set_num_threads(1)


def photo(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0].clamp(0, 1)


@functools.cache
def shared_tiny() -> WaLLoC:
    return WaLLoC.examples()[0]


@pytest.fixture
def tiny() -> WaLLoC:
    return shared_tiny()


@pytest.fixture(scope="module")
def latents() -> list[np.ndarray]:
    """Smooth first channel, Laplacian others whose scale varies over the plane, as in a photograph."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(2):
        smooth = np.cumsum(np.cumsum(rng.normal(0, 0.15, (96, 128)), 0), 1)
        scale = np.exp(np.sin(np.arange(96)[:, None] / 9) + np.cos(np.arange(128) / 7))
        others = rng.laplace(0, 1, (4, 96, 128)) * scale
        out.append(np.clip(np.rint(np.concatenate((smooth[None], others))), -LIMIT, LIMIT).astype(np.int8))
    return out


# -- the wavelet packet transform


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_wavelet_packets_reconstruct(channels, levels, height, width, seed):
    unit = 2**levels
    generator = torch.Generator().manual_seed(seed)
    for shape in ((2, channels, height * unit, width * unit), (2, channels, width * unit)):
        x = torch.rand(shape, generator=generator, dtype=torch.float64)
        bands = analysis(x, levels)
        assert bands.shape[1] == channels * unit ** (len(shape) - 2)
        assert bands.shape[2:] == torch.Size(n // unit for n in shape[2:])
        torch.testing.assert_close(synthesis(bands, levels), x, rtol=0, atol=1e-12)


def test_filters_are_cdf_9_7():
    pywt = pytest.importorskip("pywt")
    x = torch.rand(1, 1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = split(x)
    want_low, want_high = pywt.dwt(x[0, 0].numpy(), "bior4.4", "symmetric")
    np.testing.assert_allclose(low[0, 0, 4:28], want_low[6:30], atol=1e-9)
    np.testing.assert_allclose(high[0, 0, 4:28], want_high[6:30], atol=1e-9)


def test_wavelet_packets_are_linear_and_differentiable():
    x, y = photo(32, 40)[None].double().requires_grad_(), torch.rand(1, 192, 4, 5, dtype=torch.float64)
    bands = analysis(x, 3)
    (adjoint,) = torch.autograd.grad(bands, x, y)
    torch.testing.assert_close((bands * y).sum(), (x * adjoint).sum())
    energy = (bands.square().sum() / x.square().sum()).item()
    assert 0.9 < energy < 1.1  # nearly orthonormal


def test_companding_curve_inverts():
    y = torch.arange(-LIMIT, LIMIT + 1).float()
    torch.testing.assert_close(compress(expand(y)), y, rtol=0, atol=1e-2)
    assert compress(torch.tensor([-1e9, 1e9])).tolist() == pytest.approx([-HALF, HALF])
    assert torch.isfinite(expand(torch.tensor([-128.0, 128.0]))).all()


# -- the entropy coder


def test_latents_come_back_and_cost_their_ideal_length(latents):
    coder = LatentCoder(fit_coder(latents, 2, steps=60), 2)
    stream = coder.encode(latents[1])
    assert np.array_equal(coder.decode(stream, latents[1].shape), latents[1])
    ideal = coder.ideal_bits(latents[1])
    assert ideal <= 8 * stream.nbytes <= 1.01 * ideal + 64
    # the context model must earn its keep: below the static order-0 entropy of each channel
    order0 = 0.0
    for channel in latents[1]:
        share = np.bincount(channel.ravel().astype(int) + 128) / channel.size
        order0 -= channel.size * (share[share > 0] * np.log2(share[share > 0])).sum()
    assert 8 * stream.nbytes < 0.9 * order0


@functools.cache
def quick_coder(axes: int) -> LatentCoder:
    few = np.random.default_rng(0).integers(-3, 4, (2, 16 if axes == 2 else 1, 64)).astype(np.int8)
    return LatentCoder(fit_coder([few], axes, steps=5), axes)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 2), st.integers(1, 70), st.integers(1, 70), st.integers(0, 99))
def test_any_latent_of_any_size_is_coded(axes, height, width, seed):
    rng = np.random.default_rng(seed)
    coder = quick_coder(axes)
    latent = rng.integers(-LIMIT, LIMIT + 1, (2, height if axes == 2 else 1, width)).astype(np.int8)
    assert np.array_equal(coder.decode(coder.encode(latent), latent.shape), latent)


def test_what_drives_the_coder_is_integers_and_a_longer_stream_is_noticed(latents):
    state = fit_coder(latents, 2, steps=10)
    assert not any(v.is_floating_point() for v in state.values())
    coder = LatentCoder(state, 2)
    stream = coder.encode(latents[0])
    with pytest.raises(ValueError, match="goes on after"):
        coder.decode(np.concatenate((stream, stream)), latents[0].shape)


# -- the method


def test_conformance(tiny):
    assert_conforms(tiny, max_examples=4, fresh_process=False)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from((1, 3)), st.integers(1, 40), st.integers(1, 40))
def test_the_dimensionality_reduction_is_uniform(channels, height, width):
    tiny = shared_tiny()
    x = torch.rand(channels, height, width)
    latent = tiny.latent(x)
    assert latent.shape == (3, -(-height // 4), -(-width // 4))
    assert latent.dtype == np.int8
    back = tiny.decode(tiny.encode(x))
    assert back.shape == x.shape
    assert 0 <= float(back.min()) <= float(back.max()) <= 1


def test_a_file_decodes_from_its_bytes_with_a_saved_state(tiny, tmp_path: Path):
    tiny.save(tmp_path / "state.safetensors")
    again = WaLLoC(latent_channels=3, levels=2, width=4, blocks=1, steps=4).load(tmp_path / "state.safetensors")
    for x in (photo(33, 47), tersor.Audio(torch.sin(torch.arange(999) / 9).expand(2, -1), 16000.0)):
        raw = tiny.encode(x).to_bytes()
        back, want = again.decode(raw), tiny.decode(tiny.encode(x))
        if isinstance(x, tersor.Audio):
            assert back.rate == 16000.0
            back, want = back.samples, want.samples
        assert torch.equal(torch.as_tensor(back), torch.as_tensor(want))


def test_fit_lowers_the_loss():
    def edges(seed: int) -> torch.Tensor:  # a linear decoder blurs edges, a deep one learns to draw them
        return (photo(64, 64, seed) > 0.5).float() * 0.6 + 0.2

    losses: list[float] = []

    def report(step, over, loss, quality, bits, error):
        if over < 0.66:  # before the rate leaves the loss
            losses.append(loss)

    fit_network([edges(seed) for seed in range(3)], 1, 2, 16, 1, (i / 100 for i in range(100)), report=report)
    assert np.mean(losses[-10:]) < 0.93 * np.mean(losses[:10])


def test_shipped_states_fit_the_promise():
    import skimage.data

    codec = WaLLoC()
    folder = Path(codec._default_state()).parent
    assert all(f.stat().st_size <= 4_000_000 for f in folder.glob("*.safetensors"))
    x = torch.from_numpy(skimage.data.astronaut().transpose(2, 0, 1).copy()).float() / 255
    sizes, errors = [], []
    for quality in (1, 4, 8):
        payload = WaLLoC(quality=quality).encode(x)
        sizes.append(8 * payload.nbytes / 512**2)
        errors.append(-10 * torch.log10((WaLLoC(quality=quality).decode(payload) - x).square().mean()).item())
    assert sizes == sorted(sizes)
    assert errors == sorted(errors)
    assert sizes[0] < 0.2
    assert errors[0] > 23.5
    assert codec.latent(x).size * 16 == x.numel()
    wide = WaLLoC(latent_channels=48)
    assert wide.latent(x).size * 4 == x.numel()
    assert (wide.decode(wide.encode(x)) - x).square().mean() < 10**-3.1
    with pytest.raises(tersor.MissingStateError, match="given: audio"):
        wide.encode(tersor.Audio(torch.zeros(2, 64), 8000.0))
    grey = codec.decode(codec.encode(x[:1]))
    assert (grey - x[:1]).square().mean() < 10**-2.4
    sound = 0.3 * torch.sin(torch.arange(44100) * (2 * torch.pi * 440 / 44100)).repeat(2, 1)
    back = WaLLoC(quality=8).decode(WaLLoC(quality=8).encode(tersor.Audio(sound, 44100.0))).samples
    assert (back - sound).square().mean() < 0.05 * sound.square().mean()


# -- errors


def test_errors_say_what_was_given_and_what_is_allowed(tiny, tmp_path: Path):
    with pytest.raises(tersor.ConfigError, match=r"quality=9.*1 to 8"):
        WaLLoC(quality=9)
    with pytest.raises(tersor.ConfigError, match="latent_chanels"):
        WaLLoC.build(latent_chanels=3)
    with pytest.raises(tersor.InputError, match="4 channels; allowed with this state: 3 or 1"):
        tiny.encode(np.zeros((4, 8, 8), np.float32))
    with pytest.raises(tersor.MissingStateError, match="no fitted state"):
        WaLLoC(latent_channels=5).encode(np.zeros((3, 8, 8), np.float32))
    only_images = WaLLoC(latent_channels=2, levels=1, width=4, blocks=1, steps=1).fit([photo(24, 24)])
    with pytest.raises(tersor.MissingStateError, match="fitted on image; given: audio"):
        only_images.encode(np.zeros((2, 64), np.float32))
    tiny.save(tmp_path / "s.safetensors")
    with pytest.raises(tersor.StateError, match=r"3 latent channels for image.*5 latent channels"):
        WaLLoC(latent_channels=5, levels=2).load(tmp_path / "s.safetensors").encode(np.zeros((3, 8, 8), np.float32))
    with pytest.raises(tersor.InputError, match="one number of channels"):
        tiny.fit([torch.rand(3, 16, 16), torch.rand(1, 16, 16)])
    payload = tiny.encode(photo(40, 40))
    payload.parts["latent"] = np.concatenate((payload.parts["latent"],) * 3)
    with pytest.raises(tersor.CorruptPayloadError, match="goes on after"):
        tiny.decode(payload)
