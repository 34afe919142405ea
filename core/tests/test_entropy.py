"""Entropy coding: lossless, near the ideal length, the same bytes everywhere, and strict about damaged streams."""

import hashlib
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tersor
from tersor import entropy

pytest.importorskip("constriction")

INTEGERS = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "bool"]


def skewed(n: int, seed: int = 0) -> np.ndarray:
    """Symbols 0 to 11 made without floating point, so that they are alike everywhere."""
    x = np.arange(seed, seed + n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = (x >> np.uint64(40)).astype(np.int64) | 1 << 12
    return np.array([min(11, (int(b) & -int(b)).bit_length() - 1) for b in bits], np.int32)


def ideal(x: np.ndarray) -> float:
    counts = np.unique(x, return_counts=True)[1]
    return float(-(counts * np.log2(counts / x.size)).sum()) / 8


def test_table_round_trip_and_length() -> None:
    x = skewed(200_000).reshape(1000, 200)
    table = entropy.Table(np.bincount(x.reshape(-1)))
    raw = entropy.encode(x, table)
    assert ideal(x) < len(raw) < 1.0005 * ideal(x) + 8
    assert abs(table.bits(x) / 8 - len(raw)) < 8
    back = entropy.decode(raw, table, x.shape)
    assert back.dtype == np.int32
    assert np.array_equal(back, x)
    assert np.array_equal(entropy.decode(np.frombuffer(raw, np.uint8), table, x.shape), x)


@given(
    st.lists(st.integers(0, 1 << 62), min_size=1, max_size=40),
    st.integers(-(1 << 40), 1 << 40),
    st.lists(st.integers(0, 39), max_size=50),
)
@settings(max_examples=60, deadline=None)
def test_any_table(counts: list[int], offset: int, picks: list[int]) -> None:
    table = entropy.Table(np.array(counts), offset)
    assert int(table.probabilities.sum()) == 1 << 24
    assert int(table.probabilities.min()) >= 1
    x = np.array([offset + p % len(counts) for p in picks], np.int64)
    assert np.array_equal(entropy.decode(entropy.encode(x, table), table, x.shape), x)


def test_coder_uses_exactly_these_integers() -> None:
    """An independent ANS decoder over the integers of the table reads the stream."""
    table = entropy.Table(np.array([5, 0, 1 << 40, 7, 123456789]), -2)
    x = skewed(500) % 5 - 2
    raw = entropy.encode(x, table)[:-2]
    words = np.frombuffer(raw + b"\0" * (-len(raw) % 4), "<u4").tolist()
    state = words.pop()
    if words:
        state = state << 32 | words.pop()
    ends = np.cumsum(table.probabilities)
    out = []
    for _ in range(x.size):
        low = state & (1 << 24) - 1
        s = int(np.searchsorted(ends, low, "right"))
        p = int(table.probabilities[s])
        state = (state >> 24) * p + low - int(ends[s]) + p
        if state < 1 << 32 and words:
            state = state << 32 | words.pop()
        out.append(s - 2)
    assert out == x.tolist()


@pytest.mark.parametrize("bad", [np.zeros(0, int), np.array([-1, 2]), np.array([0.5]), np.ones((2, 2), int)])
def test_tables_refused(bad: np.ndarray) -> None:
    with pytest.raises(tersor.InputError):
        entropy.Table(bad)


@pytest.mark.parametrize("bad", [np.array([0, 3]), np.array([-1]), np.array([1 << 40]), np.array([0.0])])
def test_symbols_outside_of_the_table(bad: np.ndarray) -> None:
    with pytest.raises(tersor.InputError):
        entropy.encode(bad, [1, 2, 3])


@given(
    st.sampled_from(INTEGERS).flatmap(
        lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9), elements=None)
    )
)
@settings(max_examples=150, deadline=None)
def test_pack_any_integers(x: np.ndarray) -> None:
    back = entropy.unpack(entropy.pack(x), x.shape, x.dtype.name)
    assert back.dtype == x.dtype
    assert np.array_equal(back, x)


@pytest.mark.parametrize("offset", [0, -(1 << 63), 1 << 62, 12345])
@pytest.mark.parametrize("span", [1, 2, 100, (1 << 16) - 1, 1 << 16, 1 << 20, (1 << 61) + 5])
def test_pack_ranges(offset: int, span: int) -> None:
    x = np.array([offset, offset + span, offset, offset + span // 2, offset + span // 3], np.int64)
    assert np.array_equal(entropy.unpack(entropy.pack(x), x.shape), x)


def test_pack_is_near_the_ideal_and_strided() -> None:
    x = (skewed(300_000) * 3 - 1000).reshape(300, 1000).T
    raw = entropy.pack(x)
    assert len(raw) < 1.001 * ideal(x) + 16
    assert np.array_equal(entropy.unpack(raw, x.shape, "int16"), x)
    rng = np.random.default_rng(0)
    wide = np.rint(rng.normal(0, 1e6, 100_000)).astype(np.int64)
    bits = np.log2(1e6) + 0.5 * np.log2(2 * np.pi * np.e)
    raw = entropy.pack(wide)
    assert len(raw) * 8 / wide.size < bits + 0.1
    assert np.array_equal(entropy.unpack(raw, wide.size), wide)


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(skewed(999)).reshape(27, 37).T
    assert np.array_equal(entropy.unpack(entropy.pack(x), x.shape), x.numpy())
    counts = torch.bincount(x.reshape(-1))
    raw = torch.frombuffer(bytearray(entropy.encode(x, counts)), dtype=torch.uint8)
    assert np.array_equal(entropy.decode(raw, counts, x.shape), x.numpy())
    mean, std = torch.randn(x.shape), torch.rand(x.shape) + 0.1
    assert np.array_equal(entropy.decode_gaussian(entropy.encode_gaussian(x, mean, std), mean, std, x.shape), x.numpy())


def test_gaussian_is_near_the_ideal() -> None:
    rng = np.random.default_rng(1)
    n = 100_000
    mean, std = rng.normal(0, 10, n).astype(np.float32), np.exp(rng.normal(0.4, 0.6, n)).astype(np.float32)
    x = np.rint(rng.normal(mean, std)).astype(np.int32)
    raw = entropy.encode_gaussian(x, mean, std)
    assert np.array_equal(entropy.decode_gaussian(raw, mean, std, n), x)
    from math import erf

    phi = np.vectorize(lambda z: 0.5 * (1 + erf(z / 2**0.5)))
    mass = phi((x + 0.5 - mean) / std.astype(float)) - phi((x - 0.5 - mean) / std.astype(float))
    bits = float(-np.log2(np.maximum(mass, 1e-12)).sum())
    assert len(raw) * 8 < 1.001 * bits


@given(
    hnp.arrays(np.int32, st.integers(0, 30), elements=st.integers(-(1 << 30) + 1, (1 << 30) - 1)),
    st.floats(-1.6e7, 1.6e7, width=32),
    st.floats(2.0**-100, 2.0**100, width=32),
)
@settings(max_examples=60, deadline=None)
def test_gaussian_codes_any_symbol(x: np.ndarray, mean: float, std: float) -> None:
    means = np.full(x.shape, mean, np.float32)
    for m in (mean, means):
        raw = entropy.encode_gaussian(x, m, std)
        assert np.array_equal(entropy.decode_gaussian(raw, m, std, x.shape), x)


@pytest.mark.parametrize(("mean", "std"), [(0, 0), (0, -1), (0, np.nan), (0, np.inf), (np.nan, 1), (1e9, 1), ([0, 1], 1)])
def test_gaussian_parameters_refused(mean: object, std: object) -> None:
    with pytest.raises(tersor.InputError):
        entropy.encode_gaussian(np.zeros(5, int), np.array(mean, float), np.array(std, float))


def test_gaussian_tables_are_distributions() -> None:
    from math import erf

    for table in range(0, len(entropy._WHICH), 37):
        scale, place = entropy._WHICH[table]
        p = entropy.gaussian_probabilities(scale, place)
        assert int(p.sum()) == 1 << 24
        assert int(p.min()) >= 1
        sigma, width = entropy._scale(scale), entropy._OFFSETS // entropy._places(scale)
        centre = (place + (width - 1) / 2) / entropy._OFFSETS
        reach = entropy._reach(scale)
        for d in (0, 1, -1, round(sigma)):
            exact = (erf((d + 0.5 - centre) / sigma / 2**0.5) - erf((d - 0.5 - centre) / sigma / 2**0.5)) / 2
            assert abs(int(p[d + reach]) / (1 << 24) - exact) < 1e-6 + 2e-3 * exact


def test_bytes_are_the_same_everywhere() -> None:
    """Golden: these bytes are decoded by every later release."""
    x = skewed(64)
    assert entropy.encode(x, [32, 16, 8, 4, 2, 1, 1, 0, 0, 0, 0, 0]).hex() == GOLDEN["encode"]
    assert entropy.pack(x).hex() == GOLDEN["pack"]
    assert entropy.pack(x.astype(np.int64) * 10**15 - 7).hex()[:64] == GOLDEN["wide"]
    mean, std = np.arange(64) / 7, (np.arange(64) % 9 + 1) / 4
    assert entropy.encode_gaussian(x, mean, std).hex() == GOLDEN["gaussian"]
    tables = b"".join(entropy.gaussian_probabilities(*w).astype("<i4").tobytes() for w in entropy._WHICH[::5])
    assert hashlib.sha256(tables).hexdigest() == GOLDEN["tables"]


GOLDEN: dict[str, str] = {
    "encode": "9ad7e6886268bda6a903729a003a2df1ffffff7b45017b29",
    "pack": "000b10a287e3e1719c6690327ed8a2ff60317e739dfb03f903552f2e",
    "wide": "0d80809ea4918ec51360008fa3900200800080e037e037008090370000000000",
    "gaussian": "00001004930c4113713f08e58409009619115ed5b40b104de3360012f90750b2de2a008cb00700bed9b58c84c90400fbec530616ca8f6ee5631200156d8fc21c379905ced4294af7ffffff020200000037290085000000d1ffffffffffffe60ebc4d",
    "tables": "7c90f6738c9d1b7a515972edc62871986d23ae4096e07e8dd2345a32cc9d880b",
}


def streams() -> list[tuple[bytes, object]]:
    x = skewed(2000)
    mean = np.linspace(-5, 5, x.size)
    return [
        (entropy.encode(x, np.bincount(x)), lambda r: entropy.decode(r, np.bincount(x), x.size)),
        (entropy.pack(x), lambda r: entropy.unpack(r, x.size)),
        (entropy.pack(x.astype(np.int64) ** 9), lambda r: entropy.unpack(r, x.size)),
        (entropy.encode_gaussian(x, mean, 1.5), lambda r: entropy.decode_gaussian(r, mean, 1.5, x.size)),
    ]


@pytest.mark.parametrize("which", range(4))
def test_damage_is_refused(which: int) -> None:
    raw, read = streams()[which]
    good = read(raw)  # type: ignore[operator]
    rng = np.random.default_rng(0)
    wrong = 0
    cases = [raw[:n] for n in (0, 1, 2, 3, 4, 5, 8, len(raw) // 2, len(raw) - 1)] + [raw + b"\1", raw + bytes(4), raw * 2]
    for _ in range(300):
        damaged = bytearray(raw)
        damaged[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
        cases.append(bytes(damaged))
    cases += [rng.bytes(int(rng.integers(1, 200))) for _ in range(300)]
    for case in cases:
        try:
            wrong += not np.array_equal(read(case), good)  # type: ignore[operator]
        except (tersor.CorruptPayloadError, tersor.LimitError):
            continue
    assert wrong == 0


def test_another_table_or_shape() -> None:
    x = skewed(2000)
    raw = entropy.encode(x, np.bincount(x))
    for counts, n in ((np.bincount(x), 1999), (np.bincount(x), 2001), (np.bincount(x)[::-1], 2000)):
        with pytest.raises(tersor.CorruptPayloadError):
            entropy.decode(raw, counts, n)


def test_absurd_sizes() -> None:
    with pytest.raises(tersor.LimitError):
        entropy.unpack(entropy.pack([3]), 1 << 50)
    with pytest.raises(tersor.CorruptPayloadError):
        entropy.unpack(entropy.pack([300]), 1, "uint8")
    with pytest.raises(tersor.CorruptPayloadError):
        entropy.unpack(b"\xff" * 30, 5)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    entropy._library.cache_clear()
    entropy._uniform.cache_clear()
    monkeypatch.setitem(sys.modules, "constriction", None)
    try:
        with pytest.raises(tersor.MissingLibraryError, match="constriction"):
            entropy.pack([1, 2, 3])
    finally:
        entropy._library.cache_clear()
