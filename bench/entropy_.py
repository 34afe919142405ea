"""Entropy coding of a million symbols, from tensor to bytes and back."""

from __future__ import annotations

import functools
import importlib.util
import math
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import Report, Row, Size, missing, quiet, say, there, turns
from tersor import entropy


def ideal(x: np.ndarray) -> float:
    """Bits of ``x`` under its own frequencies."""
    counts = np.bincount(x)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / x.size)).sum())


def normal_bits(x: np.ndarray, mean: np.ndarray, std: np.ndarray) -> float:
    z = torch.from_numpy(np.stack([x + 0.5 - mean, x - 0.5 - mean]).astype(np.float64) / std) / math.sqrt(2)
    upper = z.abs()  # differences of tails keep their digits
    mass = torch.where(
        z[0] * z[1] > 0,
        (torch.erfc(upper[0]) - torch.erfc(upper[1])).abs() / 2,
        1 - (torch.erfc(upper[0]) + torch.erfc(upper[1])) / 2,
    )
    return float(-mass.clamp(min=1e-300).log2().sum())


FOUND = "constriction ANS, table counted but not stored"
Contestant = tuple[Callable[[], bytes], Callable[[bytes], np.ndarray]]


def bare_table(x: np.ndarray, coder: str) -> Contestant:
    """constriction as its manual says: a categorical model, the whole array in one call."""
    import constriction

    s = constriction.stream

    counts = np.bincount(x)
    model = s.model.Categorical((counts / counts.sum()).astype(np.float32), perfect=False)
    return _bare(coder, lambda c: c(x, model), lambda c: c.decode(model, x.size))


def bare_table_found(x: np.ndarray) -> Contestant:
    """As :func:`bare_table`, the frequencies counted and the model built in the call; they are not stored."""

    def encode() -> bytes:
        return bare_table(x, "ANS")[0]()

    return encode, bare_table(x, "ANS")[1]


def bare_gaussian(x: np.ndarray, mean: np.ndarray, std: np.ndarray, coder: str) -> Contestant:
    import constriction

    s = constriction.stream

    model = s.model.QuantizedGaussian(int(x.min()) - 1, int(x.max()) + 1)
    return _bare(coder, lambda c: c(x, model, mean, std), lambda c: c.decode(model, mean, std))


def _bare(coder: str, push: Callable[[Any], Any], pull: Callable[[Any], np.ndarray]) -> Contestant:
    import constriction

    s = constriction.stream

    def encode() -> bytes:
        out = s.stack.AnsCoder() if coder == "ANS" else s.queue.RangeEncoder()
        push(out.encode_reverse if coder == "ANS" else out.encode)
        return bytes(out.get_compressed().tobytes())

    def decode(raw: bytes) -> np.ndarray:
        words = np.frombuffer(raw, np.uint32)
        out = pull(s.stack.AnsCoder(words) if coder == "ANS" else s.queue.RangeDecoder(words))
        return out

    return encode, decode


def compressai_ans() -> Any:
    """CompressAI's extension alone (the package asks for torchvision), or None."""
    found = importlib.util.find_spec("compressai")
    if found is None or not found.submodule_search_locations:
        return None
    for path in Path(found.submodule_search_locations[0]).glob("ans.*.so"):
        package = types.ModuleType("compressai")
        package.__path__ = [str(path.parent)]
        before = sys.modules.get("compressai")
        sys.modules["compressai"] = package
        try:
            return importlib.import_module("compressai.ans")
        finally:
            sys.modules.pop("compressai") if before is None else sys.modules.update(compressai=before)
    return None


def compressai_table(ans: Any, x: np.ndarray) -> Contestant:
    """Arrays to lists included, as CompressAI's own models call it."""
    counts = np.append(np.bincount(x), 1)
    weights = np.maximum(counts * 65000 // counts.sum(), 1)
    weights[weights.argmax()] += 65536 - weights.sum()
    cdf = [[0, *np.cumsum(weights).tolist()]]
    sizes, offsets, zeros = [len(cdf[0])], [0], [0] * x.size

    def encode() -> bytes:
        out: bytes = ans.RansEncoder().encode_with_indexes(x.tolist(), zeros, cdf, sizes, offsets)
        return out

    return encode, lambda raw: np.array(ans.RansDecoder().decode_with_indexes(raw, zeros, cdf, sizes, offsets), np.int32)


def torchac_table(torchac: Any, x: np.ndarray) -> Contestant:
    """A row of the table for each symbol, as torchac wants it; the rows are made beforehand."""
    counts = np.bincount(x)
    row = torch.from_numpy(np.append(0, np.cumsum(counts) / counts.sum()).astype(np.float32))
    rows, symbols = row.expand(x.size, -1).contiguous(), torch.from_numpy(x.astype(np.int16))
    return (lambda: torchac.encode_float_cdf(rows, symbols)), (lambda raw: torchac.decode_float_cdf(rows, raw).numpy())


def run(size: Size) -> Report:
    n = size.pick(20_000, 1_000_000)
    rounds = size.pick(1, 7)
    if not there("constriction"):
        return Report("", [missing("all", "constriction", "pip install constriction")])
    rng = np.random.default_rng(0)
    wide = (np.clip(np.rint(rng.normal(0, 19, n)), -127, 127) + 127).astype(np.int32)
    peaky = np.minimum(rng.geometric(0.772, n) - 1, 15).astype(np.int32)
    mean = rng.normal(0, 10, n).astype(np.float32)
    std = np.exp(rng.normal(0.45, 0.6, n)).astype(np.float32)
    gauss = np.rint(rng.normal(mean, std)).astype(np.int32)
    ans = compressai_ans()
    torchac = None
    if there("torchac") and (shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja")):
        say("entropy: torchac compiles itself at its first import")
        try:
            import os

            os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            with quiet():
                torchac = importlib.import_module("torchac")
        except Exception as error:  # no compiler
            say(f"entropy: torchac is left out: {error}")
    rows = []
    cases: list[tuple[str, np.ndarray, float, dict[str, Contestant]]] = []
    for name, x in (("wide table", wide), ("peaky table", peaky)):
        table = entropy.Table(np.bincount(x))
        tensor = torch.from_numpy(x)
        sides: dict[str, Contestant] = {
            "ours": (
                functools.partial(entropy.encode, tensor, table),
                lambda raw, table=table: entropy.decode(raw, table, n),  # type: ignore[misc]
            ),
            "ours, pack": (functools.partial(entropy.pack, tensor), lambda raw: entropy.unpack(raw, n, "int32")),
            "constriction ANS": bare_table(x, "ANS"),
            "constriction range": bare_table(x, "range"),
            FOUND: bare_table_found(x),
        }
        if ans is not None:
            sides["CompressAI rANS"] = compressai_table(ans, x)
        if torchac is not None and (name != "wide table" or size.quick):  # a wide table takes half a gigabyte
            sides["torchac"] = torchac_table(torchac, x)
        cases.append((name, x, ideal(x), sides))
    tensors = [torch.from_numpy(a) for a in (gauss, mean, std)]
    cases.append(
        ("Gaussian per symbol", gauss, normal_bits(gauss, mean, std), {
            "ours": (
                functools.partial(entropy.encode_gaussian, *tensors),
                lambda raw: entropy.decode_gaussian(raw, tensors[1], tensors[2], n),
            ),
            "constriction ANS": bare_gaussian(gauss, mean, std, "ANS"),
            "constriction range": bare_gaussian(gauss, mean, std, "range"),
        })
    )  # fmt: skip
    for name, x, bits, sides in cases:
        say(f"entropy: {name}")
        streams = {k: encode() for k, (encode, _) in sides.items()}
        for k, (_, decode) in sides.items():
            if not np.array_equal(decode(streams[k]), x):
                raise AssertionError(f"{k} did not give the symbols back")
        encoding = turns({k: s[0] for k, s in sides.items()}, rounds)
        decoding = turns({k: functools.partial(s[1], streams[k]) for k, s in sides.items()}, rounds)
        case = f"{name}, {bits / n:.3g} bits"
        for own in ("ours", "ours, pack"):
            if own not in sides:
                continue
            label = case + (", table found and stored" if own != "ours" else "")
            over = 100 * (8 * len(streams[own]) / bits - 1)
            rows.append(Row(case=label, measure="over the ideal length", unit="%", ours=over, better="lower", aim=0.1))
            if own != "ours":
                peers = [FOUND]
            else:
                peers = [p for p in sides if not p.startswith("ours") and p != FOUND]
            for peer in peers:
                for way, seconds in (("encode", encoding), ("decode", decoding)):
                    aim = 0.91 if peer == "constriction ANS" and own == "ours" else None
                    rows.append(
                        Row(case=label, measure=way, unit="Msymbols/s", ours=n / seconds[own] / 1e6, peer=peer,
                            theirs=n / seconds[peer] / 1e6, aim=aim,
                            note=f"theirs {100 * (8 * len(streams[peer]) / bits - 1):+.3f} % over" if way == "encode" else "")
                    )  # fmt: skip
            peer = "constriction ANS" if own == "ours" else FOUND
            rows.append(
                    Row(case=label, measure="encode and decode", unit="ms", ours=1e3 * (encoding[own] + decoding[own]), peer=peer,
                        theirs=1e3 * (encoding[peer] + decoding[peer]), better="lower", aim=1.1)
                )  # fmt: skip
    if ans is None:
        rows.append(missing("tables", "CompressAI rANS", "pip install --no-deps compressai"))
    if torchac is None:
        rows.append(missing("peaky table", "torchac", "pip install ninja; pip install --no-deps torchac (needs a C++ compiler)"))
    return Report(
        f"{n} symbols, from int32 tensor to bytes and back", rows,
        ["Ours codes with the stack coder (ANS), whose encoding and decoding together are constriction's fastest."],
    )  # fmt: skip
