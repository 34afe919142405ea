"""The file format: what is written is read, and nothing else is."""

import os

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor import container
from tersor.container import Header
from tersor.results import Spec

HEADER = Header(kind="codec", method="zstd", distribution="tersor-zstd", version="0.1.0", spec=Spec("bytes", (5,), "bytes"))
PARTS = st.dictionaries(
    st.text(max_size=5),
    st.one_of(
        st.binary(max_size=50),
        st.builds(
            lambda s, d: (np.arange(int(np.prod(s))).reshape(s) % 2).astype(d),
            st.lists(st.integers(0, 4), max_size=3),
            st.sampled_from(["u1", "i2", "f2", "f4", "f8", "bool", "i8", "u4", "c8"]),
        ),
    ),
    max_size=4,
)


@given(PARTS, st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=2), st.booleans())
@settings(deadline=None)
def test_what_is_written_is_read(parts, meta, bitwise):
    header = attrs.evolve(
        HEADER, meta=meta, bitwise=bitwise, state=b"12345678", check=7, spec=Spec("audio", (2, 5), "float32", 8000.0)
    )
    raw = container.dumps(header, parts)
    assert len(raw) == container.size(header, parts)
    back, views = container.read(raw)
    assert (back.meta, back.bitwise, back.state, back.check, back.spec) == (meta, bitwise, b"12345678", 7, header.spec)
    assert list(views) == list(parts)
    for part in back.parts:
        given_dtype, given_shape, given_view = container.buffer(parts[part.name])
        assert (part.dtype, part.shape) == (given_dtype, given_shape)
        assert bytes(views[part.name]) == bytes(given_view)


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_every_change_is_noticed(data):
    raw = bytearray(container.dumps(HEADER, {"data": b"hello", "more": np.arange(3, dtype=np.int16)}))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(tersor.FileError):
        container.read(bytes(raw))


def test_every_truncation_is_noticed():
    raw = container.dumps(HEADER, {"data": b"hello"})
    for n in range(len(raw)):
        with pytest.raises(tersor.TruncatedFileError if n else tersor.NotTersorFileError):
            container.read(raw[:n])
    with pytest.raises(tersor.TruncatedFileError, match="goes on"):
        container.read(raw + b"\0")


def test_a_changed_padding_byte_is_noticed():
    header = attrs.evolve(HEADER, spec=Spec("array", (3,), "uint8"))
    parts = {"a": np.zeros(70_001, np.uint8), "b": np.zeros(70_001, np.uint8)}
    raw = bytearray(container.dumps(header, parts))
    second = container.read(bytes(raw))[0].parts[1]
    assert second.offset % 64 == 0
    raw[second.offset - 1] = 1
    with pytest.raises(tersor.ChecksumError):
        container.read(bytes(raw))


def test_each_fault_has_its_own_error():
    raw = container.dumps(HEADER, {"data": b"hello"})
    with pytest.raises(tersor.NotTersorFileError, match="begins with"):
        container.read(b"PK\3\4" + raw)
    with pytest.raises(tersor.UnsupportedVersionError, match="format version 9; this installation reads version 1"):
        container.read(raw[:4] + b"\x09" + raw[5:])
    with pytest.raises(tersor.LimitError, match="a header of"):
        container.read(raw[:5] + b"\xff\xff\xff\xff\x7f" + raw[6:])
    with pytest.raises(tersor.ChecksumError):
        container.read(raw[:-1] + bytes([raw[-1] ^ 1]))


def test_a_small_payload_costs_at_most_64_bytes_of_overhead():
    text = b"hello, hello"
    payload = tersor.codec("zstd", level=19).encode(text)
    assert payload.nbytes - len(payload.parts["data"]) <= 64
    image = np.zeros((3, 8, 8), np.float32)
    payload = tersor.codec("png").encode(image)
    assert payload.nbytes - len(payload.parts["data"]) <= 64


def test_large_files_are_mapped_and_verified(tmp_path):
    big = {"x": np.arange(20_000_000, dtype=np.float32), "y": np.ones(3)}
    header = attrs.evolve(HEADER, spec=Spec("array", (20_000_000,), "float32"))
    size = container.write(tmp_path / "big.tsr", header, big)
    assert size == os.path.getsize(tmp_path / "big.tsr") == container.size(header, big)
    _back, views = container.read(tmp_path / "big.tsr")
    assert np.array_equal(np.frombuffer(views["x"], np.float32), big["x"])
    with open(tmp_path / "big.tsr", "r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)
        file.seek(50_000_000)
        file.write(bytes([byte[0] ^ 4]))
    with pytest.raises(tersor.ChecksumError):
        container.read(tmp_path / "big.tsr")
    assert container.inspect(tmp_path / "big.tsr")["checksum"] == "mismatch"


def test_inspect_loads_no_plugin():
    raw = container.dumps(attrs.evolve(HEADER, method="no-such", distribution="tersor-no-such"), {"data": b"hello"})
    out = tersor.inspect(raw)
    assert out["method"] == "no-such"
    assert out["parts"] == [{"name": "data", "dtype": "bytes", "shape": [5], "bytes": 5}]
    assert (out["bytes"], out["checksum"], out["bits_per_element"]) == (len(raw), "ok", 8 * len(raw) / 5)
    with pytest.raises(tersor.UnknownMethodError, match="no installed codec is named 'no-such'"):
        tersor.decompress(raw)


def test_a_result_larger_than_the_limit_is_refused_before_it_is_made(monkeypatch):
    payload = tersor.codec("zstd").encode(bytes(1000))
    raw = payload.to_bytes()
    with pytest.raises(tersor.LimitError, match="decoding takes 1000 bytes; allowed: at most 999"):
        tersor.decompress(raw, limit=999)
    monkeypatch.setenv("TERSOR_MAX_DECODED", "10")
    with pytest.raises(tersor.LimitError, match="at most 10"):
        tersor.decompress(raw)


def test_a_newer_configuration_version_is_refused(monkeypatch):
    payload = tersor.codec("zstd").encode(b"x")
    monkeypatch.setattr(type(payload.method), "config_version", 2)
    raw = payload.to_bytes()
    monkeypatch.setattr(type(payload.method), "config_version", 1)
    with pytest.raises(tersor.UnsupportedVersionError, match="configuration version 2.*installed 0.1.0 reads up to 1"):
        tersor.decompress(raw)


def test_a_full_or_read_only_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    payload = tersor.codec("zstd").encode(os.urandom(100_000))
    target = tmp_path / "x.tsr"
    target.write_bytes(b"old")
    with pytest.raises(OSError, match="No such file"):
        payload.save(tmp_path / "missing" / "x.tsr")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container, "_digest", full)
    with pytest.raises(OSError, match="No space left"):
        payload.save(target)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.tsr"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_the_system_says_disk_full():
    payload = tersor.codec("zstd").encode(os.urandom(300_000))
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        container.write(file, payload._header(), payload.parts)


@pytest.mark.parametrize(("number", "text"), [(30, "Read-only file system"), (13, "Permission denied")])
def test_a_refusal_of_the_system_names_the_file_that_was_asked_for(tmp_path, monkeypatch, number, text):
    def refuse(path, *_, **__):
        raise OSError(number, text, str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(OSError, match=f"{text}: '{tmp_path}/x.tsr'"):
        tersor.codec("zstd").encode(b"x").save(tmp_path / "x.tsr")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_one_element_of_any_stride_is_stored() -> None:
    torch = pytest.importorskip("torch")
    from tersor.arrays import buffer

    x = torch.as_strided(torch.arange(12).half(), (1, 1), (7, 5), 3)
    name, shape, view = buffer(x)
    assert (name, shape) == ("float16", (1, 1))
    assert bytes(view) == x.clone().numpy().tobytes()
