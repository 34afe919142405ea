"""Damaged, truncated and made-up input against the container and every method's decoder.

At least 20,000 inputs: each gives an error under TersorError or, where only the payload's meaning was changed and its checksum
mended, a result of the shape that the header says. None may crash, keep a decoder busy for a second, or take memory beyond the
limit that was given.
"""

import contextlib
import resource
import time

import numpy as np
import pytest

import tersor
from tersor import container, registry
from tersor.domains import unwrap
from tersor.testing import checks

LIMIT = 1 << 24
METHODS = [(m["kind"], m["name"]) for m in tersor.available() if m["kind"] != "decoder" and m["status"] == "ok"]
CONTAINER_INPUTS = 14_000
PER_METHOD = max(40, 8_000 // max(1, len(METHODS)))


def payload_of(kind, name):
    m = registry.lookup(kind, name).examples()[0]
    found = []
    checks._each(m, checks._Context(3, False), lambda x: found.append(checks.apply(m, x)), 3)
    return m, max(found, key=lambda p: p.spec.size)


def mutants(raw, rng, count):
    for _ in range(count):
        what = rng.integers(0, 6)
        b = bytearray(raw)
        if what == 0:
            b = b[: int(rng.integers(0, len(b)))]
        elif what == 1:
            for at in rng.integers(0, len(b), int(rng.integers(1, 8))):
                b[at] = int(rng.integers(0, 256))
        elif what == 2:
            at = int(rng.integers(0, len(b)))
            b[at:at] = rng.integers(0, 256, int(rng.integers(1, 20)), np.uint8).tobytes()
        elif what == 3:
            at = int(rng.integers(0, len(b)))
            del b[at : at + int(rng.integers(1, 20))]
        elif what == 4:
            b = bytearray(rng.integers(0, 256, int(rng.integers(0, 200)), np.uint8).tobytes())
            b[:5] = raw[: min(5, len(b))]
        else:
            start = int(rng.integers(5, max(6, len(b) - 9)))
            b[start : start + 9] = b"\xff" * int(rng.integers(0, 9)) + b"\x7f"
        if bytes(b) != raw:
            yield bytes(b)


def resealed(raw):
    """The same bytes with a checksum that fits, where they parse at all: what an attacker would send."""
    with contextlib.suppress(tersor.TersorError):
        view = memoryview(bytearray(raw))
        header, length = container._parse(view)
        if length == len(view):
            head, _ = container._head(view)
            parts = [view[p.offset : p.offset + p.nbytes] for p in header.parts]
            return bytes(view[:-8]) + container._digest(view[:head], parts)
    return None


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(raw, state, may_decode):
    start = time.process_time()
    try:
        value = tersor.decompress(raw, state=state, limit=LIMIT)
    except tersor.TersorError as error:
        assert str(error)  # noqa: PT017
        value = None
    else:
        assert may_decode, "damaged bytes decoded as if nothing had happened"
    assert time.process_time() - start < 1, "a decoder was kept busy for a second"
    return value


@pytest.fixture(autouse=True)
def _warm():
    """Imports and first calls are not what is measured."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", ["zstd", "png", "rtn", "magnitude"])
def test_damaged_files_never_decode(name):
    _m, payload = payload_of(registry.kind_of(name), name)
    raw = payload.to_bytes()
    run(raw, None, True)
    before, rng = peak(), np.random.default_rng(len(name))
    for bad in mutants(raw, rng, CONTAINER_INPUTS // 4):
        run(bad, None, False)
        with contextlib.suppress(tersor.TersorError):
            tersor.inspect(bad)
    assert peak() - before < 4 * LIMIT + (64 << 20)


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_made_up_payloads_with_a_good_checksum(kind, name):
    m, payload = payload_of(kind, name)
    state = m.state if m.fitted else None
    raw = payload.to_bytes()
    run(raw, state, True)
    run(checks.hostile(payload, np.random.default_rng(0), 1)[0].to_bytes(), state, True)
    before, rng = peak(), np.random.default_rng(len(name))
    for bad in checks.hostile(payload, rng, PER_METHOD // 2):
        value = run(bad.to_bytes(), state, True)
        if value is not None and kind != "pruner":
            got = unwrap(value)[0]
            assert (len(got),) == bad.spec.shape if isinstance(got, bytes) else tuple(got.shape) == bad.spec.shape
    for bad in mutants(raw, rng, PER_METHOD // 2):
        sealed = resealed(bad)
        run(sealed or bad, state, sealed is not None)
    assert peak() - before < 4 * LIMIT + (64 << 20)


def test_there_are_twenty_thousand():
    assert CONTAINER_INPUTS + len(METHODS) * (PER_METHOD // 2 * 2) >= 20_000
