"""Every conformance check can fail: a deliberately wrong method for each."""

import time
from typing import Any, NamedTuple

import numpy as np
import pytest

from tersor import Codec, Decoded, Decoder, InputError, Pruner, Quantizer, Uniform, between, container, field, method, registry
from tersor.testing import CHECKS, assert_conforms, check_method
from tersor.testing import checks as kit


@method
class Sound(Codec):
    """Stores arrays."""

    name = "sound"
    domains = ("array",)
    lossless = True
    scale: int = field(1, between(1, 9))

    def _encode(self, x, spec):
        return {"data": np.ascontiguousarray(x).tobytes(), "count": int(x.size)}

    def _decode(self, parts, spec):
        return np.frombuffer(parts["data"], spec.dtype).reshape(spec.shape).copy()


@method
class Nearest(Quantizer):
    """Rounds to eighths."""

    name = "nearest"
    domains = ("latent",)
    idempotent = True

    def _quantize(self, x, calibration, spec):
        return {"codes": np.rint(np.clip(x, -1e6, 1e6) * 8).astype(np.int32)}

    def _dequantize(self, parts, spec):
        return (parts["codes"] / np.float32(8)).astype(np.float32).reshape(spec.shape)

    def bound(self, x):
        return 1 / 16 + 1e-3 * float(np.abs(x).max(initial=0))


@method
class Rows(Nearest):
    """Rounds the weights of a layer to eighths, whatever calibrates it."""

    name = "rows"
    domains = ("weight",)
    calibration = "optional"
    wants = ("gram",)

    def _quantize(self, x, calibration, spec):
        return {"codes": np.rint(np.clip(np.asarray(x, np.float32), -1e6, 1e6) * 8).astype(np.int32)}

    def _dequantize(self, parts, spec):
        return (parts["codes"] / np.float32(8)).astype(np.float32).reshape(spec.shape)

    def _uniform(self, parts, spec):
        torch = pytest.importorskip("torch")
        codes = torch.from_numpy(parts["codes"].reshape(spec.shape))
        scale = torch.full((len(codes), 1), 1 / 8)
        return Uniform((codes + 128).byte(), scale, torch.full_like(scale, 128), 8, codes.shape[1])


def steps_layer(noise=0.0):
    """Rounds to eighths, with the gradient straight through; ``noise`` makes it wrong."""
    torch = pytest.importorskip("torch")

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("step", torch.full((2,), 1 / 8))

        def forward(self, z):
            if not z.is_floating_point() or z.ndim < 1 or z.shape[-1] not in (3, 4) or not bool(torch.isfinite(z).all()):
                raise InputError("vectors of 3 or 4 finite floats are allowed")
            x = z.detach().float() + noise * torch.rand(z.shape)
            codes = (x / self.step[0]).round().long()
            values = self.codes_to_values(codes).to(z.dtype)
            return Quantized(values + (z - z.detach()), codes, (z.float() - x).square().sum())

        def codes_to_values(self, codes):
            return codes * self.step[0]

        def values_to_codes(self, values):
            return (values / self.step[0]).round().long()

    return Layer()


class Quantized(NamedTuple):
    values: Any
    codes: Any
    loss: Any


@method
class Trains(Nearest):
    """Rounds to eighths, in a layer too."""

    name = "trains"

    def layer(self):
        return steps_layer()

    def example_inputs(self):
        return [np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)]


@method
class First(Pruner):
    """Keeps the first half."""

    name = "first"
    domains = ("weight",)

    def promised(self, size):
        return size // 2

    def _prune(self, tensors, calibration):
        left = self.promised(sum(t.size for t in tensors.values()))
        out = {}
        for k, t in tensors.items():
            out[k] = (np.arange(t.size) < left).reshape(t.shape)
            left -= int(out[k].sum())
        return out


@method
class Argmax(Decoder):
    """Greedy."""

    name = "argmax"
    exact = "greedy"

    def _decode(self, source, prompt, budget, **options):
        session, out = source.open(), []
        logits = session.extend(prompt)
        while len(out) < budget:
            out.append(int(np.argmax(logits[-1])))
            if out[-1] in source.stop or len(out) == budget:
                break
            logits = session.extend([out[-1]])
        return Decoded(np.array(out), calls=session.calls)


@method
class Draw(Decoder):
    """Samples."""

    name = "draw"
    exact = "distribution"
    seed: int = field(0)

    def reseeded(self, seed):
        return type(self)(seed=seed)

    def _decode(self, source, prompt, budget, **options):
        rng = np.random.default_rng(self.seed)
        session, out = source.open(), []
        logits = session.extend(prompt)
        while len(out) < budget:
            p = np.exp(logits[-1].astype(np.float64) - logits[-1].max())
            out.append(int(self.pick(p / p.sum(), rng)))
            if out[-1] in source.stop or len(out) == budget:
                break
            logits = session.extend([out[-1]])
        return Decoded(np.array(out), calls=session.calls)

    def pick(self, p, rng):
        return rng.choice(len(p), p=p)


@pytest.mark.parametrize("cls", [Sound, Nearest, Rows, Trains, First, Argmax, Draw])
def test_sound_methods_pass_every_check(cls, monkeypatch):
    registry.index()
    monkeypatch.setitem(registry._classes, (cls.kind, cls.name), cls)
    results = assert_conforms(cls, fresh_process=False)
    assert [r.check for r in results] == [n for n, (kinds, _) in CHECKS.items() if cls.kind in kinds]


def wrong(base, **functions):
    """A method like ``base`` with functions exchanged."""
    return method(type("Wrong" + base.__name__, (base,), {"__doc__": "Wrong.", **functions}))


counter = iter(range(10**9))


def _lossy(self, parts, spec):
    return Sound._decode(self, parts, spec) * 0


def _mutating(self, x, spec):
    if x.flags.writeable and x.size and x.ndim:
        x[...] = 0
    return Sound._encode(self, x, spec)


class _Marked(bytes):
    """Bytes that know that they were never written."""


def _marked(self, x, spec):
    return {"data": _Marked(np.ascontiguousarray(x).tobytes())}


def _decode_marked(self, parts, spec):
    out = np.frombuffer(parts["data"], spec.dtype).reshape(spec.shape).copy()
    return out if isinstance(parts["data"], _Marked) or not out.size else np.roll(out, 1) + out


def _busy(self, parts, spec):
    end = time.process_time() + 0.2
    while parts.get("count") != spec.size and time.process_time() < end:
        pass
    return Sound._decode(self, parts, spec)


def _scaled(self, x, calibration, spec):
    if np.ptp(np.asarray(x, np.float32), axis=1).min() == 0:
        raise ZeroDivisionError("a row without spread")
    return Rows._quantize(self, x, calibration, spec)


def _weighted(self, x, calibration, spec):
    if calibration is not None and calibration.gram is not None:
        np.linalg.cholesky(calibration.gram)
    return Rows._quantize(self, x, calibration, spec)


def _shifted(self, parts, spec):
    uniform = Rows._uniform(self, parts, spec)
    return Uniform(uniform.codes, uniform.scale, uniform.zero + 1, uniform.bits, uniform.group_size)


WRONG = {
    "configuration": wrong(Sound, __str__=lambda self: "sound:scale=3"),
    "metadata": None,
    "round-trip": wrong(Sound, _decode=_lossy),
    "from-bytes": wrong(Sound, lossless=False, _encode=_marked, _decode=_decode_marked),
    "measured-size": None,
    "repeatable": wrong(Sound, _encode=lambda self, x, spec: {**Sound._encode(self, x, spec), "n": next(counter)}),
    "memory-layout": wrong(Sound, _encode=lambda self, x, spec: {"data": x.copy(order="K").tobytes(order="A"), "s": list(x.strides)}),
    "torch-and-numpy": None,
    "invalid-input": None,
    "empty-input": None,
    "weights": wrong(Rows, _quantize=_scaled),
    "calibration-data": wrong(Rows, _quantize=_weighted),
    "layer": wrong(Trains, layer=lambda self: steps_layer(noise=1.0)),
    "levels": wrong(Rows, _uniform=_shifted),
    "corrupted-bytes": None,
    "hostile-payload": wrong(Sound, _decode=_busy),
    "fresh-process": None,
    "missing-state": None,
    "codes-to-values-to-codes": wrong(Nearest, _dequantize=lambda self, parts, spec: Nearest._dequantize(self, parts, spec) + np.float32(0.07)),
    "mask": wrong(First, promised=lambda self, size: size // 2 + 1, _prune=lambda self, t, c: First()._prune(t, c)),
    "several-tensors": wrong(First, _prune=lambda self, t, c: dict(list(First._prune(self, t, c).items())[:1])),
    "same-as-greedy": wrong(Argmax, _decode=lambda self, s, p, b, **o: Argmax._decode(self, s, [*p[:-1], 0], b)),
    "same-distribution": wrong(Draw, pick=lambda self, p, rng: np.argmax(p + rng.random(len(p)) * 0.3)),
    "budget-and-cost": wrong(Argmax, _decode=lambda self, s, p, b, **o: Argmax._decode(self, s, p, b + 1)),
    "invalid-prompt": wrong(Argmax, decode=lambda self, s, p, n=8, **o: Argmax().decode(s, [0], n)),
}  # fmt: skip  # None: has a test of its own below


def failed(cls, **options):
    return {r.check: r.reason for r in check_method(cls, fresh_process=False, **options) if not r.passed}


@pytest.mark.parametrize("check", [k for k, v in WRONG.items() if v is not None])
def test_the_check_fails_for_a_wrong_method(check, monkeypatch):
    monkeypatch.setattr(kit, "BUSY_SECONDS", 0.1)
    reasons = failed(WRONG[check])
    assert check in reasons, f"passes; failed are {reasons}"
    assert len(reasons[check]) > 20


def test_metadata_that_contradicts_the_class(monkeypatch):
    zstd = registry.lookup("codec", "zstd")
    monkeypatch.setattr(zstd, "domains", ("bytes",))
    assert "its keywords name domains ['bytes', 'array', 'text'], its class ['bytes']" in failed("zstd")["metadata"]


def test_a_size_that_is_estimated(monkeypatch):
    monkeypatch.setattr(container, "size", lambda header, parts: 100)
    assert "nbytes says 100, the file has" in failed(Sound)["measured-size"]


def test_torch_input_that_is_treated_differently():
    torch = pytest.importorskip("torch")

    def enter(self, x, domain=None):
        native, spec = Sound._enter(self, x, domain)
        return (native + 1 if isinstance(x, torch.Tensor) and native.dtype != bool else native), spec

    assert "as a torch tensor gives other bytes" in failed(wrong(Sound, _enter=enter), max_examples=30)["torch-and-numpy"]


def test_an_empty_input_that_comes_back_otherwise():
    cls = wrong(
        Sound, allow_empty=True, lossless=False, _leave=lambda self, x, spec: x,
        _decode=lambda self, parts, spec: np.zeros(1, np.float32) if not spec.size else Sound._decode(self, parts, spec),
    )  # fmt: skip
    registry.index()
    registry._classes["codec", "sound"] = cls
    try:
        assert "comes back as array of float32, shape (1,)" in failed(cls)["empty-input"]
    finally:
        del registry._classes["codec", "sound"]


def test_damage_that_goes_unnoticed(monkeypatch):
    registry.index()
    monkeypatch.setitem(registry._classes, ("codec", "sound"), Sound)
    monkeypatch.setattr(container, "_intact", lambda *_: True)
    monkeypatch.setattr(Sound, "lossless", False)
    assert "damaged bytes decode as if nothing had happened" in failed(Sound)["corrupted-bytes"]


def test_an_invalid_input_that_is_taken_or_refused_with_the_wrong_error():
    def enter(self, x, domain=None):
        raise TypeError("what is this?")

    assert "should be refused with InputError; it gives TypeError" in failed(wrong(Nearest, _enter=enter))["invalid-input"]
    careless = wrong(Nearest, _enter=lambda self, x, domain=None: Nearest._enter(self, np.ones((2, 2), np.float32), domain))
    assert "is taken; InputError was due" in failed(careless)["invalid-input"]


def test_a_state_that_is_not_asked_for(monkeypatch):
    cls = wrong(Nearest, fitted=True, examples=classmethod(lambda c: [c().with_state({"a": np.ones(1)})]))
    monkeypatch.setattr("tersor.kinds.find_state", lambda m, wanted: m)
    assert "names another state decodes all the same" in failed(cls)["missing-state"]


def test_a_decoder_that_depends_on_its_process(tmp_path, monkeypatch):
    info = tmp_path / "tersor_moody-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: tersor-moody\nVersion: 1.0\nSummary: x\nKeywords: family:test,domain:array\n\n")
    (info / "entry_points.txt").write_text("[tersor.codec]\nmoody = tersor_moody\n")
    (tmp_path / "tersor_moody.py").write_text(
        "import os\nimport numpy as np\nfrom tersor import Codec, hookimpl, method\n"
        "@method\nclass Moody(Codec):\n    'x'\n    name='moody'\n    domains=('array',)\n"
        "    def _encode(self, x, spec): return {'n': 1}\n"
        "    def _decode(self, parts, spec): return np.full(spec.shape, os.getpid() % 251).astype(spec.dtype)\n"
        "@hookimpl\ndef tersor_codec(): return Moody\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TERSOR_CACHE", str(tmp_path / "cache"))
    reasons = {r.check: r.reason for r in check_method("moody") if not r.passed}
    assert "a fresh process with other threads decodes other values" in reasons["fresh-process"]


def test_a_method_that_refuses_everything_does_not_pass():
    def refuse(self, x, spec):
        raise InputError("not today")

    assert "it refused every input drawn" in failed(wrong(Sound, _encode=refuse))["round-trip"]


def test_expected_failures_carry_reasons_and_must_fail():
    lossy = wrong(Sound, _decode=_lossy)
    names = failed(lossy)
    assert_conforms(lossy, fresh_process=False, expected=dict.fromkeys(names, "it is lossy on purpose"))
    with pytest.raises(AssertionError, match="round-trip: expected to fail .it is odd., and passes"):
        assert_conforms(Sound, fresh_process=False, expected={"round-trip": "it is odd"})
    with pytest.raises(ValueError, match="no such check: colour"):
        assert_conforms(Sound, fresh_process=False, expected={"colour": "x"})


def test_there_is_a_wrong_method_for_every_check():
    assert set(WRONG) == set(CHECKS)


def test_checks_that_do_not_apply_say_so():
    results = {r.check: r for r in check_method("zstd", fresh_process=False, max_examples=2)}
    assert results["round-trip"].passed
    assert not results["round-trip"].skipped
    assert results["missing-state"].skipped
    assert results["missing-state"].passed
    assert "state" in results["missing-state"].reason
