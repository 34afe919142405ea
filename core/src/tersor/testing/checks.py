"""The checks. Each is a function ``(method, context)`` that raises :class:`Failure` with the reason."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings

from tersor import config, container, registry
from tersor.api import apply_method, decompress, restore
from tersor.arrays import SIZES, buffer, to_numpy
from tersor.domains import DOMAINS, summary, unwrap
from tersor.errors import CalibrationError, ConfigError, InputError, StateError, TersorError
from tersor.progress import track
from tersor.results import Calibration, Payload
from tersor.testing import strategies
from tersor.testing.source import TableSource, greedy_tokens
from tersor.tokens import TokenPruner


@attrs.frozen
class Result:
    """One check: its name, whether it passed, and why not; ``skipped`` where it does not apply to the method (and so passes)."""

    check: str
    passed: bool
    reason: str = ""
    skipped: bool = False


#: CPU seconds that a decoder may spend on a small made-up payload
BUSY_SECONDS = 5.0


class Failure(Exception):
    """A method does not do what its kind promises."""


class Skip(Exception):
    """A check does not apply to a method; the message says why."""


@attrs.define
class _Context:
    examples: int
    fresh_process: bool


Check = Callable[[Any, _Context], None]
CHECKS: dict[str, tuple[tuple[str, ...], Check]] = {}
_ALL = ("codec", "quantizer", "pruner", "decoder")
_DATA = ("codec", "quantizer", "pruner")


def _check(*kinds: str) -> Callable[[Check], Check]:
    def add(function: Check) -> Check:
        CHECKS[function.__name__.strip("_").replace("_", "-")] = (kinds, function)
        return function

    return add


def run_checks(methods: list[Any], max_examples: int, fresh_process: bool) -> list[Result]:
    """Every check of the kind over every instance; a check passes where it does for all of them."""
    if not methods:
        return [Result("examples", False, "examples() gives no instance")]
    context = _Context(max_examples, fresh_process)
    out = []
    wanted = [(n, f) for n, (kinds, f) in CHECKS.items() if methods[0].kind in kinds]
    for name, function in track(wanted, f"checking {methods[0].name}"):
        reason, skips = "", []
        for m in methods:
            try:
                function(m, context)
            except Skip as skip:
                skips.append(str(skip))
            except Failure as failure:
                reason = f"{m}: {failure}"
            except Exception as error:
                reason = f"{m}: {type(error).__name__}: {error}"
            if reason:
                break
        skipped = len(skips) == len(methods)
        out.append(Result(name, not reason, skips[0] if skipped else reason[:2000], skipped))
    return out


def _each(m: Any, context: _Context, body: Callable[[Any], None], count: int | None = None) -> None:
    """``body`` over inputs that the method takes: drawn ones, and those that it names itself."""
    taken = 0

    @settings(
        max_examples=count or context.examples, deadline=None, database=None, derandomize=True, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate,) if count == 1 else (Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )  # fmt: skip
    @given(strategies.inputs(m.domains))
    def drawn(x: Any) -> None:
        nonlocal taken
        try:
            apply(m, x)
        except InputError:
            return
        taken += 1
        body(x)

    drawn()
    for x in m.example_inputs():
        taken += 1
        body(x)
    if not taken:
        raise Failure("it refused every input drawn, and example_inputs() gives none")


def apply(m: Any, x: Any) -> Payload:
    """The method's compressing operation, with random calibration data where it asks for some."""
    return apply_method(m, x, calibration_for(m, x))


def calibration_for(m: Any, x: Any) -> Any:
    """Random inputs, 32 x in, for a method that requires calibration."""
    if m.calibration != "required":
        return None
    shape = unwrap(x)[0].shape
    width = int(np.prod(shape[1:])) if len(shape) > 1 else int(shape[0])
    return np.random.default_rng(width).standard_normal((32, width)).astype(np.float32)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (bytes, bytearray)) or isinstance(b, (bytes, bytearray)):
        return bytes(a) == bytes(b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(_same(a[k], b[k]) for k in a)
    a, b = to_numpy(unwrap(a)[0]), to_numpy(unwrap(b)[0])
    return a.shape == b.shape and a.dtype == b.dtype and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def _copy(x: Any) -> Any:
    return x if isinstance(x, bytes) else np.array(unwrap(x)[0])


def _with_state(m: Any, payload: Payload) -> Payload:
    if m.fitted:
        payload.method = payload.method.with_state(m.state)
    return payload


def _reread(m: Any, raw: bytes) -> Any:
    return restore(_with_state(m, Payload.from_bytes(raw)))


# -- every kind


@_check(*_ALL)
def _configuration(m: Any, _: _Context) -> None:
    text = str(m)
    name, given_settings = config.parse(text)
    if name != m.name or config.build(type(m), given_settings, text=True) != m:
        raise Failure(f"the string {text!r} does not build an equal method")
    if config.build(type(m), json.loads(json.dumps(m.settings()))) != m:
        raise Failure("its settings do not survive JSON")
    try:
        type(m).build(surely_not_a_setting=1)
    except ConfigError:
        pass
    else:
        raise Failure("an unknown setting is not refused")
    for f in attrs.fields(type(m)):
        try:
            setattr(m, f.name, getattr(m, f.name))
        except attrs.exceptions.FrozenInstanceError:
            break
        raise Failure("it is not frozen: derive from a kind and decorate with @tersor.method")
    if hash(m) != hash(config.build(type(m), m.settings())):
        raise Failure("equal methods have different hashes")


@_check(*_ALL)
def _metadata(m: Any, _: _Context) -> None:
    try:
        entry = registry.find(m.kind, m.name)
    except TersorError:
        return  # a class that is not installed has no metadata
    meta = entry.metadata
    if not "".join(meta.get("summary", [])):
        raise Failure("its distribution has no summary (project.description)")
    if len(entry.keywords("family", meta)) != 1:
        raise Failure("its distribution's keywords name no family: keywords = ['family:...', 'domain:...']")
    if set(entry.keywords("domain", meta)) != set(m.domains):
        raise Failure(f"its keywords name domains {entry.keywords('domain', meta)}, its class {list(m.domains)}")
    if not (type(m).__doc__ or "").strip():
        raise Failure("its class has no docstring")


# -- codecs, quantizers, pruners


@_check(*_DATA)
def _round_trip(m: Any, context: _Context) -> None:
    def body(x: Any) -> None:
        before = _copy(x)
        payload = apply(m, x)
        if not _same(before, _copy(x)):
            raise Failure(f"it changes its input ({summary(unwrap(x)[0])})")
        back = restore(payload)
        data, got = unwrap(x)[0], unwrap(back)[0]
        if type(x) in (bytes,) and not isinstance(back, bytes):
            raise Failure(f"bytes come back as {summary(back)}")
        if not isinstance(data, bytes):
            if tuple(got.shape) != data.shape or str(got.dtype).removeprefix("torch.") != data.dtype.name:
                raise Failure(f"{summary(data)} comes back as {summary(got)}")
            if DOMAINS[payload.spec.domain].finite and not np.isfinite(to_numpy(got)).all():
                raise Failure(f"{summary(data)} comes back with NaN or infinity")
        if m.lossless and not _same(data, got):
            raise Failure(f"it says lossless, and {summary(data)} comes back changed")
        bound = m.bound(data)
        if bound is not None:
            error = float(np.abs(to_numpy(got).astype(np.float64) - np.asarray(data, np.float64)).max(initial=0))
            if error > bound * (1 + 1e-5) + 1e-12:
                raise Failure(f"its error bound is {bound:g}, and {summary(data)} comes back {error:g} off")

    _each(m, context, body)


@_check(*_DATA)
def _from_bytes(m: Any, context: _Context) -> None:
    def body(x: Any) -> None:
        payload = apply(m, x)
        raw = payload.to_bytes()
        if not _same(restore(payload), _reread(m, raw)):
            raise Failure(f"{summary(unwrap(x)[0])}: decoding from the bytes differs from decoding the payload in memory")
        if _with_state(m, Payload.from_bytes(raw)).to_bytes() != raw:
            raise Failure("a payload that was read does not write the same bytes again")

    _each(m, context, body)


@_check(*_DATA)
def _measured_size(m: Any, context: _Context) -> None:
    def body(x: Any) -> None:
        payload = apply(m, x)
        raw = payload.to_bytes()
        if payload.nbytes != len(raw):
            raise Failure(f"nbytes says {payload.nbytes}, the file has {len(raw)}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "x.tsr")
            if payload.save(path) != len(raw) or path.read_bytes() != raw:
                raise Failure("save() writes other bytes than to_bytes()")

    _each(m, context, body)


@_check(*_DATA)
def _repeatable(m: Any, context: _Context) -> None:
    def body(x: Any) -> None:
        first, second = apply(m, x).to_bytes(), apply(m, x).to_bytes()
        if first != second:
            raise Failure(f"{summary(unwrap(x)[0])}: encoding twice gives different bytes")

    _each(m, context, body)


@_check(*_DATA)
def _memory_layout(m: Any, context: _Context) -> None:
    def body(x: Any) -> None:
        if isinstance(x, bytes):
            return
        data = unwrap(x)[0]
        want = apply(m, data).to_bytes()
        for layout in strategies.LAYOUTS:
            if apply(m, strategies.lay_out(data, layout)).to_bytes() != want:
                raise Failure(f"{summary(data)} laid out {layout} gives other bytes than the plain one")

    _each(m, context, body, max(2, context.examples // 3))


@_check(*_DATA)
def _torch_and_numpy(m: Any, context: _Context) -> None:
    if "torch" not in sys.modules:
        raise Skip("torch is not imported")
    torch = sys.modules["torch"]

    def body(x: Any) -> None:
        data = unwrap(x)[0]
        if isinstance(data, bytes):
            return
        if apply(m, data).to_bytes() != apply_method(m, torch.from_numpy(np.array(data)), calibration_for(m, data)).to_bytes():
            raise Failure(f"{summary(data)} as a torch tensor gives other bytes than as a numpy array")

    _each(m, context, body, max(2, context.examples // 3))


@_check(*_DATA)
def _invalid_input(m: Any, _: _Context) -> None:
    for what, x in strategies.invalid(m.domains):
        try:
            apply_method(m, x, None if m.calibration != "required" else np.ones((4, 16), np.float32))
        except InputError as error:
            if len(str(error)) < 10:
                raise Failure(f"{what} is refused with {str(error)!r}, which says nothing") from error
        except Exception as error:
            raise Failure(f"{what} should be refused with InputError; it gives {type(error).__name__}: {error}") from error
        else:
            raise Failure(f"{what} is taken; InputError was due")


@_check(*_DATA)
def _empty_input(m: Any, _: _Context) -> None:
    for x in strategies.empties(m.domains):
        try:
            payload = apply(m, x)
        except InputError:
            continue
        back = _reread(m, payload.to_bytes())
        if not _same(x, back):
            raise Failure(f"{summary(x)} is taken and comes back as {summary(unwrap(back)[0])}")


@_check("codec", "quantizer")
def _weights(m: Any, _: _Context) -> None:
    """Weights that are awkward but sound: constant rows, one row, one column, 16-bit floats, widths that no group divides."""
    if "weight" not in m.domains:
        raise Skip("it does not take weights")
    rng = np.random.default_rng(3)
    constant = rng.standard_normal((6, 21)).astype(np.float32)
    constant[1], constant[2], constant[3] = 0.0, 0.7, -2.0
    awkward: dict[str, Any] = {
        "rows that are constant": constant,
        "one row": constant[:1] + rng.standard_normal((1, 21)).astype(np.float32),
        "one column": constant[:, :1] + 0.1,
        "a width of a prime": rng.standard_normal((4, 131)).astype(np.float32),
        "subnormal and large magnitudes": np.geomspace(1e-38, 1e4, 80).astype(np.float32).reshape(4, 20),
        "float16": constant.astype(np.float16),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        awkward["bfloat16"] = torch.from_numpy(constant).bfloat16()
    for what, x in awkward.items():
        back = restore(_taken(m, x, calibration_for(m, x), what))
        if str(back.dtype).removeprefix("torch.") != str(x.dtype).removeprefix("torch.") or tuple(back.shape) != tuple(x.shape):
            raise Failure(f"{what}: {summary(x)} comes back as {summary(back)}")
        if not np.isfinite(to_numpy(back.float() if torch is not None and isinstance(back, torch.Tensor) else back)).all():
            raise Failure(f"{what}: comes back with NaN or infinity")


def _taken(m: Any, x: Any, calibration: Any, what: str) -> Payload:
    """The payload of sound data, which no method may refuse."""
    try:
        return apply_method(m, x, calibration)
    except Exception as error:
        raise Failure(f"{what}: refused ({type(error).__name__}: {error})") from error


@_check("codec", "quantizer")
def _calibration_data(m: Any, _: _Context) -> None:
    """Calibration that is singular, empty, of another width or not finite: a sound result or a CalibrationError."""
    if "weight" not in m.domains or m.calibration == "none":
        raise Skip("it takes no calibration data")
    import warnings

    rng = np.random.default_rng(4)
    w = rng.standard_normal((6, 21)).astype(np.float32)
    inputs = rng.standard_normal((40, 21)).astype(np.float32)
    dead = inputs.copy()
    dead[:, [0, 7, 20]] = 0
    twins = np.concatenate([inputs[:, :7]] * 3, 1)
    line = rng.standard_normal(21).astype(np.float32)
    poor: dict[str, Any] = {
        "inputs of zeros": Calibration(inputs=inputs * 0),
        "a gram of zeros": Calibration(gram=np.zeros((21, 21), np.float32), count=40),
        "a gram of rank one": Calibration(gram=np.outer(line, line), count=1),
        "one sample": Calibration(inputs=inputs[:1]),
        "columns that were never active": Calibration(inputs=dead),
        "columns that are the same": Calibration(inputs=twins),
        "a gram of large numbers": Calibration(gram=(inputs.T @ inputs) * 1e12, count=40),
        "a gram of small numbers": Calibration(gram=(inputs.T @ inputs) * 1e-12, count=40),
        "both": Calibration(inputs=inputs, gram=inputs.T @ inputs, count=40),
    }
    wrong: dict[str, Any] = {
        "no samples": np.zeros((0, 21), np.float32),
        "inputs of another width": inputs[:, :20],
        "inputs with NaN": np.where(inputs == inputs[3, 3], np.nan, inputs),
        "inputs with infinity": np.where(inputs == inputs[3, 3], np.inf, inputs),
        "a gram of another width": Calibration(gram=np.eye(20, dtype=np.float32), count=40),
        "a gram with NaN": Calibration(gram=np.full((21, 21), np.nan, np.float32), count=40),
        "text": "calibration",
    }
    if m.calibration == "required":
        wrong |= {"nothing": None, "a calibration without data": Calibration()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a Hessian is singular may be said
        for what, calibration in poor.items():
            try:
                back = restore(apply_method(m, w, calibration))
            except CalibrationError:
                continue
            except Exception as error:
                raise Failure(f"{what} gives {type(error).__name__}: {error}; a result or a CalibrationError is due") from error
            if not np.isfinite(to_numpy(back)).all():
                raise Failure(f"{what} gives NaN or infinity")
        for what, calibration in wrong.items():
            try:
                apply_method(m, w, calibration)
            except (CalibrationError, InputError):
                continue
            except Exception as error:
                raise Failure(f"{what} as calibration gives {type(error).__name__}: {error}; CalibrationError is due") from error
            raise Failure(f"{what} is taken as calibration; CalibrationError was due")


@_check("quantizer")
def _levels(m: Any, _: _Context) -> None:
    """What a quantizer gives as evenly spaced levels are its values."""
    if "weight" not in m.domains:
        raise Skip("it does not take weights")
    rng = np.random.default_rng(5)
    shown = False
    for shape in ((8, 32), (5, 21)):
        w = rng.standard_normal(shape).astype(np.float32)
        codes = apply_method(m, w, calibration_for(m, w))
        uniform = m.uniform(codes)
        if uniform is None:
            continue
        shown = True
        want, got = to_numpy(restore(codes)), to_numpy(uniform.dense())
        if got.shape != want.shape or not np.allclose(got, want, rtol=1e-5, atol=1e-6 * float(np.abs(want).max(initial=0))):
            raise Failure(f"its levels (uniform) are not its values: they differ by up to {np.abs(got - want).max():g}")
    if not shown:
        raise Skip("its values are no evenly spaced levels")


@_check("quantizer")
def _layer(m: Any, _: _Context) -> None:
    """The layer that trains: any leading shape, its codes exact, evaluation without a trace, half precision, poor input, states."""
    torch = sys.modules.get("torch")
    if torch is None or "latent" not in m.domains or not callable(getattr(m, "layer", None)):
        raise Skip("it has no torch layer of vectors")
    given = [x for x in map(to_numpy, m.example_inputs()) if x.ndim > 1 and x.dtype == np.float32]
    if not given:
        raise Failure("it has a layer, and example_inputs() gives no float32 array of vectors to try it with")
    vectors = np.concatenate([g.reshape(-1, g.shape[-1]) for g in given if g.shape[-1] == given[0].shape[-1]])
    x = torch.from_numpy(np.resize(vectors, (12, vectors.shape[1])))
    dim = x.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _check_training(torch, m.layer().train(), x)
        layer = m.layer().train()
        layer(x)
        _check_evaluation(torch, layer.eval(), x)
        for training in (True, False):
            _check_refusals(torch, layer.train(training), x)
        _check_states(torch, m, layer.eval(), x)
        late = m.layer().train()
        late(x.new_zeros(0, dim))
        late(x[:1])
        if not all(bool(torch.isfinite(v).all()) for v in late.state_dict().values() if v.is_floating_point()):
            raise Failure("its layer has NaN or infinity after an empty batch and one vector")


def _check_result(torch: Any, z: Any, out: Any, what: str) -> None:
    values, codes, loss = out
    if values.shape != z.shape or values.dtype != z.dtype:
        raise Failure(f"{what}: its layer takes {summary(z)} and gives {summary(values)}")
    if codes.dtype != torch.int64 or codes.shape[: z.ndim - 1] != z.shape[:-1] or codes.ndim > z.ndim:
        raise Failure(f"{what}: its layer's codes are {summary(codes)} for {summary(z)}; int64 of the leading shape are due")
    if loss.ndim or not bool(torch.isfinite(loss)) or not bool(torch.isfinite(values).all()):
        raise Failure(f"{what}: its layer gives NaN or infinity, or a loss that is no scalar: {loss}")


def _check_training(torch: Any, layer: Any, x: Any) -> None:
    shapes = ((12,), (3, 4), (2, 3, 2), (1, 12), (12, 1, 1))
    for shape in shapes:
        z = x.view(*shape, -1).clone().requires_grad_()
        out = layer(z)
        _check_result(torch, z, out, f"leading shape {shape}")
        (out.values.square().sum() + out.loss).backward()
        if z.grad is None or not bool(torch.isfinite(z.grad).all()) or not bool(z.grad.any()):
            raise Failure(f"leading shape {shape}: no gradient, or one with NaN, comes back through its layer")
    for z in (x[:1], x[0], x.new_zeros(0, x.shape[1]), x.new_zeros(2, 0, x.shape[1]), x * 0, x[:1].expand(12, -1)):
        _check_result(torch, z, layer(z), f"{summary(z)} in training")
    for z in (x.half(), x.bfloat16(), x.double()):
        _check_result(torch, z, layer(z), f"{z.dtype} in training")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _check_result(torch, x, layer(x), "autocast")


def _check_evaluation(torch: Any, layer: Any, x: Any) -> None:
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    first, second = layer(x), layer(x)
    if not torch.equal(first.values, second.values) or not torch.equal(first.codes, second.codes):
        raise Failure("its layer gives different results for the same vectors in evaluation mode")
    if any(not torch.equal(before[k], v) for k, v in layer.state_dict().items()):
        raise Failure("evaluation changes the state of its layer")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if not torch.equal(layer(x).codes, first.codes):
            raise Failure("its layer gives other codes under autocast")
    shaped = layer(x.view(3, 4, -1))
    if not torch.equal(shaped.codes.flatten(0, 1), first.codes):
        raise Failure("its layer gives other codes for another leading shape")
    values = layer.codes_to_values(first.codes)
    if not torch.equal(values, first.values.float()):
        worst = float((values - first.values).abs().max())
        raise Failure(f"codes_to_values gives other values than its layer, by up to {worst:g}")
    if getattr(layer, "invertible", True):
        codes = layer.values_to_codes(values)
        again = layer.codes_to_values(codes)
        if not torch.equal(again, values):  # other codes may be right where two of them stand for the same
            raise Failure("values_to_codes gives codes of other values")


def _check_refusals(torch: Any, layer: Any, x: Any) -> None:
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    broken = x.clone()
    broken[2, 0] = torch.nan
    endless = x.clone()
    endless[1, -1] = -torch.inf
    wrong = {"NaN": broken, "infinity": endless, "another dimension": x.repeat(1, 2)[:, : x.shape[1] + 1], "integers": x.long(),
             "no dimension": x[0, 0]}  # fmt: skip
    for what, z in wrong.items():
        try:
            layer(z)
        except InputError:
            continue
        except Exception as error:
            raise Failure(f"its layer refuses {what} with {type(error).__name__}: {error}; InputError is due") from error
        raise Failure(f"its layer takes {what}; InputError was due")
    if any(not torch.equal(before[k], v) for k, v in layer.state_dict().items()):
        raise Failure("its layer changes by an input that it refuses")


def _check_states(torch: Any, m: Any, layer: Any, x: Any) -> None:
    state = layer.state_dict()
    again = m.layer()
    again.load_state_dict({k: v.clone() for k, v in state.items()})
    if not torch.equal(again.eval()(x).values, layer(x).values):
        raise Failure("a layer with the state of another gives other values")
    for name, value in state.items():
        if value.ndim:
            fresh = m.layer()
            before = {k: v.clone() for k, v in fresh.state_dict().items()}
            try:
                fresh.load_state_dict({**state, name: torch.cat([value, value])})
            except (StateError, RuntimeError):
                if any(not torch.equal(before[k], v) for k, v in fresh.state_dict().items()):
                    raise Failure(f"a state whose {name} has another shape is refused, and half of it loaded") from None
                continue
            raise Failure(f"its layer takes a state whose {name} has another shape")


@_check(*_DATA)
def _corrupted_bytes(m: Any, context: _Context) -> None:
    def body(x: Any) -> None:
        raw = apply(m, x).to_bytes()
        rng = np.random.default_rng(len(raw))
        spoilt = [raw[:n] for n in {0, 1, 4, 8, len(raw) // 2, len(raw) - 1}] + [raw + b"\0", raw[1:]]
        for at in rng.integers(0, len(raw), 24):
            b = bytearray(raw)
            b[at] ^= 1 << int(rng.integers(0, 8))
            spoilt.append(bytes(b))
        for bad in spoilt:
            try:
                decompress(bad, state=m.state if m.fitted else None, limit=1 << 26)
            except TersorError:
                continue
            except Exception as error:
                raise Failure(f"damaged bytes give {type(error).__name__} ({error}), not an error under TersorError") from error
            raise Failure("damaged bytes decode as if nothing had happened")

    if not _registered(m):
        raise Skip("it is not installed, so that its files cannot be read")
    _each(m, context, body, max(2, context.examples // 4))


@_check(*_DATA)
def _hostile_payload(m: Any, context: _Context) -> None:
    """Parts and scalars made up by an attacker who also mended the checksum: an error or a result of the right shape, quickly."""

    def body(x: Any) -> None:
        payload = apply(m, x)
        for bad in hostile(payload, np.random.default_rng(1), 16):
            start = time.process_time()
            try:
                restore(bad, limit=1 << 26)
            except TersorError:
                pass
            except Exception as error:
                raise Failure(
                    f"a made-up payload gives {type(error).__name__} ({error}), not an error under TersorError"
                ) from error
            spent = time.process_time() - start
            if spent > BUSY_SECONDS:
                raise Failure(f"a made-up payload keeps the decoder busy for {spent:.1f} s")

    _each(m, context, body, max(2, context.examples // 4))


def hostile(payload: Payload, rng: np.random.Generator, count: int) -> list[Payload]:
    """Payloads like this one with parts cut, grown, exchanged or filled with noise, scalars dropped or absurd, another shape."""
    out = []
    for _ in range(count):
        parts, meta, spec = dict(payload.parts), dict(payload.meta), payload.spec
        keys = list(parts)
        what = int(rng.integers(0, 6))
        key = keys[int(rng.integers(0, len(keys)))] if keys else None
        if what <= 2 and key is not None:
            dtype, shape, view = buffer(parts[key])
            raw = bytearray(view)
            if what == 0 and raw:
                for at in rng.integers(0, len(raw), 1 + len(raw) // 8):
                    raw[at] = int(rng.integers(0, 256))
            elif what == 1:
                raw = raw[: int(rng.integers(0, len(raw) + 1))]
            else:
                raw = bytearray(rng.integers(0, 256, len(raw) + int(rng.integers(0, 9)), np.uint8).tobytes())
            if dtype == "bytes":
                parts[key] = bytes(raw)
            else:
                size = SIZES[dtype]
                whole = raw[: len(raw) // size * size]
                same = len(whole) == len(view)
                like = container.Part(key, dtype, shape if same else (len(whole) // size,))
                from tersor.arrays import from_buffer

                parts[key] = from_buffer(
                    dtype, like.shape, memoryview(whole), "numpy" if isinstance(parts[key], np.ndarray) else "torch"
                )
        elif what == 3 and key is not None:
            del parts[key]
        elif what == 4 and meta:
            name = list(meta)[int(rng.integers(0, len(meta)))]
            meta[name] = [None, -1, 0, 10**12, 2**62, "x", [], [10**9] * 3, 1e308][int(rng.integers(0, 9))]
        elif spec.shape:
            shape_ = list(spec.shape)
            at = int(rng.integers(0, len(shape_)))
            shape_[at] = [0, 1, shape_[at] + 1, 2 * shape_[at] + 3, 5000][int(rng.integers(0, 5))]
            spec = attrs.evolve(spec, shape=tuple(shape_))
        out.append(type(payload)(payload.method, spec, parts, meta, payload.state, payload.check))
    return out


def _registered(m: Any) -> bool:
    try:
        return registry.lookup(m.kind, m.name) is type(m)
    except TersorError:
        return False


_FRESH = """
import json, sys, os
import numpy as np
import tersor
from tersor.domains import unwrap
from tersor.arrays import SIZES, buffer, to_numpy
import xxhash
out = []
for line in open(sys.argv[1], encoding="utf-8"):
    path, state = json.loads(line)
    value = tersor.decompress(path, state=state)
    if isinstance(value, tersor.Mask):
        value = value.to_bytes()
    if isinstance(value, dict):
        value = b"".join(to_numpy(value[k]).tobytes() for k in sorted(value))
    raw = value if isinstance(value, bytes) else np.ascontiguousarray(to_numpy(unwrap(value)[0])).tobytes()
    print(xxhash.xxh3_64_hexdigest(raw))
"""


def decode_in_fresh_process(payloads: list[tuple[Any, Payload]], threads: int = 1) -> list[str]:
    """Decode the files of (method, payload) pairs in one new interpreter; a digest of each result, as :func:`digest` gives."""
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for i, (m, payload) in enumerate(payloads):
            path, state = Path(folder, f"{i}.tsr"), None
            payload.save(path)
            if m.fitted:
                state = str(Path(folder, f"{i}.safetensors"))
                m.save(state)
            lines.append(json.dumps([str(path), state]))
        listing = Path(folder, "list")
        listing.write_text("\n".join(lines), "utf-8")
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run([sys.executable, "-c", _FRESH, str(listing)], capture_output=True, text=True, env=env, check=False)
        if done.returncode:
            raise Failure(
                f"decoding in a fresh process fails: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}"
            )
        return done.stdout.split()


def digest(value: Any) -> str:
    """What :func:`decode_in_fresh_process` prints of a value."""
    import xxhash

    if isinstance(value, dict):
        value = b"".join(to_numpy(value[k]).tobytes() for k in sorted(value))
    raw = value if isinstance(value, bytes) else np.ascontiguousarray(to_numpy(unwrap(value)[0])).tobytes()
    return xxhash.xxh3_64_hexdigest(raw)


@_check(*_DATA)
def _fresh_process(m: Any, context: _Context) -> None:
    if not context.fresh_process:
        raise Skip("not asked for")
    if not _registered(m):
        raise Skip("it is not installed, so that its files cannot be read")
    found: list[Payload] = []
    _each(m, context, lambda x: found.append(apply(m, x)), 2)
    want = [digest(restore(p)) for p in found]
    pairs = [(m, p) for p in found]
    got = decode_in_fresh_process(pairs, threads=2)
    if m.bitwise and got != want:
        raise Failure("a fresh process with other threads decodes other values, and the method says bitwise")
    if len(got) != len(want):
        raise Failure(f"a fresh process decodes {len(got)} of {len(want)} files")


@_check("codec", "quantizer")
def _missing_state(m: Any, context: _Context) -> None:
    if not m.fitted:
        raise Skip("it has no state")

    def body(x: Any) -> None:
        payload = apply(m, x)
        if payload.state is None or len(payload.state) != 8:
            raise Failure("it is fitted, and its payload names no state")
        other = Payload(payload.method, payload.spec, payload.parts, payload.meta, b"\1" * 8, payload.check)
        try:
            restore(other)
        except TersorError as error:
            if (b"\1" * 8).hex() not in str(error):
                raise Failure(f"the error for a missing state does not say which: {error}") from error
        else:
            raise Failure("a payload that names another state decodes all the same")

    _each(m, context, body, 1)


@_check("quantizer")
def _codes_to_values_to_codes(m: Any, context: _Context) -> None:
    if not m.idempotent:
        raise Skip("it does not say idempotent")

    def body(x: Any) -> None:
        once = restore(apply(m, x))
        twice = restore(apply(m, once))
        if not np.array_equal(to_numpy(once), to_numpy(twice)):
            raise Failure(f"{summary(x)}: quantizing what was dequantized gives other values, and the method says idempotent")

    _each(m, context, body)


# -- pruners


def _kept_tokens(m: Any, x: Any) -> None:
    """What a token pruner keeps: ascending places, as many as promised; apply() and the file give the same tokens."""
    kept = m.prune(x, calibration_for(m, x))
    promised = m.promised(kept.tokens)
    if promised is not None and kept.indices.shape[-1] != promised:
        raise Failure(f"it promises to keep {promised} of {kept.tokens} tokens and keeps {kept.indices.shape[-1]}")
    pruned = m.apply(x, kept)
    if not np.isfinite(to_numpy(pruned).astype(np.float64)).all():
        raise Failure(f"apply() gives NaN or infinity for {summary(x)}")
    if kept.groups is None and not np.array_equal(to_numpy(pruned), to_numpy(kept.take(m._enter(x)[0]))):
        raise Failure("apply() changes kept tokens")
    back = to_numpy(restore(m.pack(x, kept))).astype(np.float64)
    want = to_numpy(kept.expand(pruned)).astype(np.float64)
    if not np.allclose(back, want, rtol=1e-2 if x.dtype == np.float16 else 1e-6, atol=1e-6):
        raise Failure("the file gives other tokens than apply()")


@_check("pruner")
def _mask(m: Any, context: _Context) -> None:
    def body(x: Any) -> None:
        if isinstance(m, TokenPruner):
            return _kept_tokens(m, x)
        mask = m.prune(x, calibration_for(m, x))
        one = to_numpy(mask.mask)
        if one.shape != x.shape or one.dtype != bool:
            raise Failure(f"the mask of {summary(x)} is {summary(one)}; a boolean array of the same shape was due")
        promised = m.promised(x.size)
        if promised is not None and int(one.sum()) != promised:
            raise Failure(f"it promises to keep {promised} of {x.size} elements and keeps {int(one.sum())}")
        pruned = to_numpy(m.apply(x, mask))
        if not np.array_equal(pruned[one], x[one]) or np.any(pruned[~one] != 0):
            raise Failure("apply() changes kept elements or leaves dropped ones")
        if not np.array_equal(to_numpy(m.apply(pruned, mask)), pruned):
            raise Failure("applying a mask twice differs from once")

    _each(m, context, body)


@_check("pruner")
def _several_tensors(m: Any, _: _Context) -> None:
    if isinstance(m, TokenPruner):
        raise Skip("a pruner of tokens takes one array at a time")
    rng = np.random.default_rng(0)
    tensors = {"a": rng.standard_normal((6, 8)).astype(np.float32), "b.weight": rng.standard_normal((5, 3)).astype(np.float32)}
    mask = m.prune(tensors)
    if set(mask.masks) != set(tensors):
        raise Failure(f"masks for {sorted(mask.masks)} of tensors {sorted(tensors)}")
    promised = m.promised(63)
    if promised is not None and sum(int(v.sum()) for v in mask.masks.values()) != promised:
        raise Failure(f"it promises to keep {promised} of 63 elements over all tensors")
    back = _reread(m, m.pack(tensors, mask).to_bytes()) if _registered(m) else restore(m.pack(tensors, mask))
    if not _same(back, {k: to_numpy(v) for k, v in m.apply(tensors, mask).items()}):
        raise Failure("several tensors do not come back as apply() gives them")


# -- decoders


@_check("decoder")
def _same_as_greedy(m: Any, context: _Context) -> None:
    if m.exact != "greedy":
        raise Skip("it does not say that its tokens are those of greedy decoding")
    for seed in range(max(8, context.examples)):
        rng = np.random.default_rng(seed)
        source = TableSource(int(rng.integers(2, 9)), seed, stop=[0] if seed % 2 else [])
        prompt = rng.integers(0, source.vocabulary, int(rng.integers(1, 12))).tolist()
        budget = int(rng.integers(1, 30))
        want = greedy_tokens(TableSource(source.vocabulary, seed, source.stop), prompt, budget)
        got = m.decode(source, prompt, budget, **m.example_options(source)).tokens.tolist()
        if got != want:
            raise Failure(f"seed {seed}, prompt {prompt}: {got} where greedy decoding gives {want}")


@_check("decoder")
def _same_distribution(m: Any, context: _Context) -> None:
    if m.exact != "distribution":
        raise Skip("it does not say that it keeps the source's distribution")
    source, prompt, length = TableSource(3, 5, sharpness=1.0), [1, 2], 3
    n = 3000
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(n):
        tokens = m.reseeded(seed).decode(source, prompt, length, **m.example_options(source)).tokens
        counts[tuple(tokens.tolist())] = counts.get(tuple(tokens.tolist()), 0) + 1
    chi, cells = 0.0, 0
    for sequence in itertools.product(range(3), repeat=length):
        p = m.target_probability(source, prompt, sequence)
        if p * n < 1e-9:
            if counts.get(sequence, 0):
                raise Failure(f"{sequence} has probability 0 and is drawn {counts[sequence]} times")
            continue
        chi += (counts.get(sequence, 0) - n * p) ** 2 / (n * p)
        cells += 1
    if sum(counts.values()) != n or any(len(s) != length for s in counts):
        raise Failure("the output is not of the length asked for")
    freedom = max(cells - 1, 1)
    # Wilson-Hilferty: the cube root of chi-square over its freedom is close to normal
    z = ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    if z > 4.5:
        raise Failure(
            f"{n} outputs do not follow the source's distribution: chi-square {chi:.1f} over {freedom}, {z:.1f} deviations"
        )


@_check("decoder")
def _budget_and_cost(m: Any, context: _Context) -> None:
    for seed in range(max(4, context.examples // 2)):
        source = TableSource(5, seed)
        budget = 1 + seed * 3
        out = m.decode(source, [1, 2, 3], budget, **m.example_options(source))
        if len(out.tokens) > budget or (m.exact and len(out.tokens) != budget):
            raise Failure(f"{len(out.tokens)} tokens where {budget} were asked for")
        if out.tokens.dtype != np.int64 or np.any(out.tokens < 0) or np.any(out.tokens >= 5):
            raise Failure(f"tokens {out.tokens} are not numbers from 0 to 4")
        if out.calls != source.calls:
            raise Failure(f"it says {out.calls} calls; the source was called {source.calls} times")
        stopping = TableSource(5, seed, stop=[0, 1])
        tokens = m.decode(stopping, [1, 2, 3], 40, **m.example_options(stopping)).tokens
        if m.exact and any(t in stopping.stop for t in tokens[:-1].tolist()):
            raise Failure(f"{tokens.tolist()} goes on after a stop token")


@_check("decoder")
def _invalid_prompt(m: Any, _: _Context) -> None:
    source = TableSource(5)
    for what, prompt in (
        ("an empty prompt", []),
        ("a token beyond the vocabulary", [5]),
        ("a negative token", [-1]),
        ("fractions", [0.5]),
        ("two dimensions", [[1, 2]]),
    ):
        try:
            m.decode(source, prompt, 4, **m.example_options(source))
        except InputError:
            continue
        except Exception as error:
            raise Failure(f"{what} should be refused with InputError; it gives {type(error).__name__}: {error}") from error
        raise Failure(f"{what} is taken; InputError was due")
