"""Fitted methods: fit, save, load, and payloads that name the state they need."""

import os
import sys

import numpy as np
import pytest

import tersor
import tersor.io
from tersor import Codec, method, registry
from tersor.arrays import import_torch


@method
class Centred(Codec):
    """Stores differences from the mean of what it was fitted on."""

    name = "centred"
    domains = ("latent",)
    fitted = True

    def _fit(self, samples):
        return {"mean": np.mean([s.mean() for s in samples], keepdims=True).astype(np.float32)}

    def _encode(self, x, spec):
        return {"rest": x - self.state["mean"]}

    def _decode(self, parts, spec):
        return parts["rest"] + self.state["mean"]


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    registry.index()
    monkeypatch.setitem(registry._classes, ("codec", "centred"), Centred)


X = np.arange(12, dtype=np.float32).reshape(3, 4)


def test_fit_gives_a_copy_and_leaves_the_method_alone():
    plain = tersor.codec("centred")
    fitted = plain.fit([X])
    assert np.array_equal(fitted.decode(fitted.encode(X)), X)
    assert fitted == plain  # the state is not configuration
    with pytest.raises(tersor.MissingStateError, match="centred has no fitted state.*use .fit.samples.*or .load.path."):
        plain.encode(X)
    with pytest.raises(tersor.InputError, match="at least one sample"):
        plain.fit([])
    with pytest.raises(tersor.InputError, match="centred takes latent"):
        plain.fit([X, "text"])


def test_a_payload_names_its_state_and_finds_it(tmp_path, monkeypatch):
    fitted = tersor.codec("centred").fit([X])
    raw = fitted.encode(X).to_bytes()
    name = fitted.state_id.hex()
    assert tersor.inspect(raw)["state"] == name
    with pytest.raises(tersor.MissingStateError, match=f"made with state {name}, and no state is here; give it with state=PATH"):
        tersor.decompress(raw)
    fitted.save(tmp_path / "a.safetensors")
    assert np.array_equal(tersor.decompress(raw, state=tmp_path / "a.safetensors"), X)
    assert np.array_equal(tersor.decompress(raw, state=fitted.state), X)
    other = tersor.codec("centred").fit([X + 5])
    with pytest.raises(tersor.MissingStateError, match=f"the state here is {other.state_id.hex()}"):
        tersor.decompress(raw, state=other.state)
    monkeypatch.setenv("TERSOR_STATES", f"{tmp_path / 'none'}{os.pathsep}{tmp_path}")
    (tmp_path / "0.safetensors").write_bytes(b"not a state")
    assert np.array_equal(tersor.decompress(raw), X)
    again = tersor.codec("centred").load(tmp_path / "a.safetensors")
    assert again.state_id == fitted.state_id
    assert np.array_equal(again.decode(raw), X)


def test_a_file_that_is_no_state(tmp_path):
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(tersor.StateError, match="x is not a safetensors file"):
        tersor.codec("centred").load(tmp_path / "x")
    with pytest.raises(tersor.StateError, match="zstd has nothing to fit"):
        tersor.codec("zstd").fit([b"x"])


def test_a_missing_library_is_named_with_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (tmp_path / "x.wav").write_bytes(b"RIFF")
    with pytest.raises(
        tersor.MissingLibraryError, match=r"reading .*x.wav needs soundfile, which is not installed: pip install soundfile"
    ):
        tersor.io.load_audio(tmp_path / "x.wav")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(tersor.MissingLibraryError, match="pip install pillow"):
        tersor.io.load_image(tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(tersor.MissingLibraryError, match="this needs torch, which is not installed"):
        import_torch("this")


def test_progress_is_heard_and_silent_by_default(capsys):
    from tersor import progress

    heard = []
    with progress.listen(lambda label, done, total: heard.append((label, done, total))):
        assert list(tersor.track([1, 2], "work")) == [1, 2]
    assert heard == [("work", 0, 2), ("work", 1, 2), ("work", 2, 2)]
    assert list(tersor.track([1, 2], "work")) == [1, 2]
    with progress.on_terminal():  # standard error is no terminal here
        list(tersor.track([1], "work"))
    assert capsys.readouterr() == ("", "")


def test_audio_and_video_come_back_with_their_rate(tmp_path):
    tone = tersor.Audio((np.arange(-50, 50, dtype=np.float32) / 128).reshape(2, 50), 8000)
    back = tersor.decompress(tersor.compress(tone, "flac").to_bytes())
    assert (back.rate, np.asarray(back).tolist()) == (8000, np.asarray(tone).tolist())
    tersor.io.save(back, tmp_path / "t.wav")
    assert tersor.io.load(tmp_path / "t.wav").rate == 8000
    with pytest.raises(tersor.InputError, match="cannot be written as t.txt"):
        tersor.io.save(back, tmp_path / "t.txt")


def test_the_content_check_of_a_lossless_payload_holds_for_bytes_too():
    codec = tersor.codec("zstd")
    payload = codec.encode(b"hello")
    payload.check ^= 1
    for given in (payload, payload.to_bytes()):
        with pytest.raises(tersor.CorruptPayloadError, match="its check value differs"):
            codec.decode(given)
