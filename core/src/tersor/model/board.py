"""Leaderboards: every installed weight quantizer on one model, the same calibration and the same text; ``tersor bench MODEL``.

Each configuration is measured in a process of its own, which gives its peak memory, and is kept in the cache folder by model, text,
settings and code, so that a run that was cut off goes on, and one that is repeated after a method changed measures that method alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from tersor import registry
from tersor.errors import ConfigError, InputError, TersorError
from tersor.files import atomic_write
from tersor.hooks import hookimpl
from tersor.io import _library
from tersor.kinds import Quantizer
from tersor.progress import track
from tersor.registry import cache_folder

#: Bits a weight at which methods are compared.
BITS = (2, 3, 4)


@attrs.frozen(kw_only=True)
class Protocol:
    """What every method of a leaderboard gets. ``samples`` windows of ``window`` tokens of ``calibration`` calibrate; the first
    ``tokens`` tokens of the first of ``texts`` (names to texts), at most 2,049 of each other, judge in windows of 1,024; ``new_tokens`` are
    decoded for the speed."""

    calibration: str
    texts: dict[str, str]
    samples: int = 8
    window: int = 512
    tokens: int = 8193
    new_tokens: int = 24

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(attrs.asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def standard(samples: int = 8, tokens: int = 8193) -> Protocol:
    """WikiText-2's test split where it is at hand, judged on its beginning and calibrated on later parts of it; else the text that
    ships with Python (a language reference), calibrated on its first half and judged on its second."""
    from tersor.data import english_text, wikitext2

    wikitext, english = wikitext2(), english_text()
    if wikitext is None:
        name, known, new = "Python's documentation", english[: len(english) // 2], english[len(english) // 2 :]
    else:
        name, known, new = "WikiText-2", wikitext[100_000:], wikitext[:100_000]
    return Protocol(calibration=known, texts={name: new}, samples=samples, tokens=tokens)


def configurations(bits: Iterable[int] = BITS, names: Iterable[str] | None = None) -> list[str]:
    """The strings of all installed weight quantizers at about these bits, by their ``at_bits``, or at 8 where they have nothing
    else; ``names``: of these only, or strings with settings
    as they are. A method that cannot be imported is left out with a warning.

    Raises the lookup errors for names.
    """
    import warnings

    from tersor.bench import expand

    out: dict[str, None] = {}
    chosen = list(names or [])
    known = chosen or sorted(
        m["name"] for m in registry.listing() if m["kind"] == "quantizer" and "weight" in m["domain"].split(",")
    )
    for name in known:
        if ":" in name:
            out.update(dict.fromkeys(expand([name])))
            continue
        try:
            cls = registry.lookup("quantizer", name)
        except TersorError as error:
            if chosen:
                raise
            warnings.warn(f"{name} is left out: {error}", stacklevel=2)
            continue
        found = [str(m) for b in bits for m in cls.at_bits(b)] or [str(m) for m in cls.at_bits(8)]
        if chosen and not found:
            raise ConfigError(
                f"{name} has no setting for {', '.join(map(str, bits))} bits; give one: --with {name}:SETTING=VALUE"
            )
        out.update(dict.fromkeys(found))
    return list(out)


@functools.cache
def _source(path: str) -> bytes:
    """A file as it was first read here: a later edit does not pass for the code that runs."""
    return Path(path).read_bytes()


def sources_digest(method: Any, judges: Iterable[Any] | None = None) -> str:
    """Changes with the code that decides a method's result: its own modules, those of kits that they use, and ``judges``, modules
    (default: the driver)."""
    digest = hashlib.sha256()
    if judges is None:
        from tersor.model import driver, statistics

        judges = (driver, statistics)
    todo = [*judges] + ([] if method is None else [sys.modules[type(method).__module__]])
    seen: set[str] = set()
    while todo:
        module = todo.pop()
        path = getattr(module, "__file__", None)
        if module.__name__ in seen or not path:
            continue
        seen.add(module.__name__)
        digest.update(_source(path))
        for value in vars(module).values():
            home = value.__name__ if isinstance(value, type(sys)) else getattr(value, "__module__", None)
            if isinstance(home, str) and home.startswith("tersor_") and home in sys.modules:
                todo.append(sys.modules[home])
    return digest.hexdigest()


def clock() -> float:
    """Seconds: of this process with one thread, so that other work on the machine does not count; else of the wall."""
    import torch

    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def decoded_per_second(model: Any, new_tokens: int) -> float:
    """Tokens a second of greedy decoding after a prompt of 16 tokens, one sequence, the prompt's own time left out."""
    import torch

    ids = torch.arange(1000, 1016)[None] % model.config.vocab_size
    times = []
    with torch.no_grad():  # some libraries' weights are no inference tensors
        for count in (1, 1, 1 + new_tokens):  # the first is for what happens once
            start = clock()
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
            )  # fmt: skip
            times.append(clock() - start)
    return new_tokens / (times[2] - times[1])


def _resident(key: str) -> int | None:
    """Bytes of this process's memory: ``VmRSS`` (now) or ``VmHWM`` (the peak); None where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith(key):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _restart_peak() -> int | None:
    """Forget the peak of memory so far; bytes in use now."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return _resident("VmRSS")


#: What changes a model: takes the model and the calibration windows; gives bits a weight, the seconds of its own work (or None), and what then
#: lets the model compute from the compressed form, which says what runs.
Change = Callable[[Any, list[Any]], tuple[float, float | None, Callable[[], str]]]


def measured(folder: str | os.PathLike[str], name: str, protocol: Protocol, calibrated: bool, change: Change) -> dict[str, Any]:
    """A row for anything that quantizes a model in this process: what :func:`measure` gives, ``change`` doing the work."""
    from tersor.model import load_model
    from tersor.model.driver import calibration_windows

    model, tokenizer = load_model(folder)
    batches = []
    if calibrated:
        batches = calibration_windows(tokenizer, protocol.calibration, protocol.samples, protocol.window)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # into memory: a mapped file's pages would count where they are first read
    before = _restart_peak()
    start = clock()
    bits, own, runs = change(model, batches)
    row: dict[str, Any] = {"method": name, "name": name.partition(":")[0], "bits": bits, "seconds": clock() - start}
    row["method_seconds"] = row["seconds"] if own is None else own
    row["peak_bytes"] = None if before is None else max((_resident("VmHWM") or before) - before, 0)
    row["perplexity"] = perplexities(model, tokenizer, protocol)
    row["runs"] = runs()
    row["tokens_per_second"] = decoded_per_second(model, protocol.new_tokens)
    return row


def measure(folder: str | os.PathLike[str], method: Any, protocol: Protocol) -> dict[str, Any]:
    """One method on one model, in this process: a row of the leaderboard.

    ``bits``: of the written files, for each weight that was quantized. ``perplexity``: by text. ``seconds``: of quantization (of the processor, where torch has one
    thread), with the passes of the calibration data; ``method_seconds``: what of it the method took. ``peak_bytes``: the process's peak of memory while it quantized,
    less what it had with the model and the calibration tokens loaded (None where the system does not tell).
    ``tokens_per_second``: decoded, by ``runs``: the method's own layers, torch's int4 and int8 kernels where they fit all layers, else
    decoded weights. A method with layers of its own is judged with them, activation quantization included.
    """
    from tersor.api import as_method
    from tersor.model import place_layers, quantize

    method = as_method(method)
    own = type(method)._module is not Quantizer._module

    def change(model: Any, batches: list[Any]) -> tuple[float, float, Callable[[], str]]:
        with Stopwatch() as watch:
            payloads = quantize(model, method, batches)
        bits = 8 * sum(p.nbytes for p in payloads.values()) / sum(p.spec.size for p in payloads.values())
        if own:
            place_layers(model, payloads)
        return bits, watch.seconds, lambda: "own layers" if own else _packed(model, payloads) or "decoded weights"

    return measured(folder, str(method), protocol, method.calibration != "none", change)


def _packed(model: Any, payloads: dict[str, Any]) -> str:
    """Let the model compute with torch's kernels, where they fit all of its quantized layers, and say which; else nothing changes."""
    from tersor.model import pack_layers, place_layers

    trial = next(iter(payloads.values()))
    if trial.method.uniform(trial) is None:
        return ""
    weights = {name: model.get_parameter(name) for name in payloads}
    place_layers(model, payloads)
    kernels = set(pack_layers(model).values())
    if kernels <= {"int4", "int8"}:
        return f"torch's {' and '.join(sorted(kernels))} kernel"
    for name, weight in weights.items():  # back to decoded weights
        layer = model.get_submodule(name.rpartition(".")[0])
        layer.__class__ = type(layer)._plain
        del layer._modules["weight"]
        layer.__dict__.pop("_kernel", None)
        layer.register_parameter("weight", weight)
    return ""


def perplexities(model: Any, tokenizer: Any, protocol: Protocol) -> dict[str, float]:
    """By text, over the protocol's tokens."""
    from tersor.model import perplexity, token_ids

    out: dict[str, float] = {}
    for name, text in protocol.texts.items():
        count = min(protocol.tokens, 2049) if out else protocol.tokens
        out[name] = perplexity(model, token_ids(tokenizer, text, count), window=1024)
    return out


class Stopwatch:
    """Seconds that methods spend in ``quantize`` and ``encode`` while it is open: an extension like any other."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @hookimpl(wrapper=True)
    def tersor_operation(self, operation: str) -> Any:
        start = clock()
        try:
            return (yield)
        finally:
            if operation in ("quantize", "encode"):
                self.seconds += clock() - start

    def __enter__(self) -> Stopwatch:
        registry._manager().register(self)
        return self

    def __exit__(self, *_: Any) -> None:
        registry._manager().unregister(self)


def whole(folder: str | os.PathLike[str], protocol: Protocol) -> dict[str, Any]:
    """The row of the model as it is."""
    from tersor.model import load_model

    model, tokenizer = load_model(folder)
    return {
        "method": "float32", "name": "float32", "bits": 32.0, "seconds": 0.0, "method_seconds": 0.0, "peak_bytes": 0,
        "perplexity": perplexities(model, tokenizer, protocol), "runs": "float32",
        "tokens_per_second": decoded_per_second(model, protocol.new_tokens),
    }  # fmt: skip


def run(
    source: str | os.PathLike[str], methods: Iterable[str], protocol: Protocol | None = None, *, cache: str | os.PathLike[str] | None = None,
    timeout: float | None = None, peers: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows of a leaderboard, the whole model first; a method that fails gives a row with ``error``.

    ``source``: a transformers folder or a GGUF file. ``methods``: strings, see :func:`configurations`. ``cache``: the folder that keeps rows;
    default: below the cache folder. Rows that were kept have ``cached``. ``timeout``: seconds for one method.
    ``peers``: names of other rows to the module that is run for them as this one is (order as JSON in, row as JSON out).
    """
    from tersor.api import as_method
    from tersor.model.driver import _fingerprint
    from tersor.model.loading import as_folder

    protocol = protocol or standard()
    folder = as_folder(source)
    place = Path(cache) if cache is not None else cache_folder() / "leaderboard"
    place.mkdir(parents=True, exist_ok=True)
    base = json.dumps([_fingerprint(folder), protocol.digest, os.environ.get("OMP_NUM_THREADS", "")])
    peers = peers or {}
    for text in track(["float32", *methods, *peers], "leaderboard"):
        method = None if text == "float32" or text in peers else as_method(text)
        text = text if method is None else str(method)
        key = hashlib.sha256(f"{base}|{text}|{sources_digest(method)}".encode()).hexdigest()[:32]
        path = place / f"{key}.json"
        if path.is_file():
            try:
                yield {**json.loads(path.read_text("utf-8")), "cached": True}
                continue
            except ValueError:
                path.unlink()
        row = _in_process(str(folder), text, protocol, timeout, peers.get(text, __name__))
        if "error" not in row:
            with atomic_write(path) as file:
                file.write(json.dumps(row).encode())
        yield row


def _in_process(folder: str, text: str, protocol: Protocol, timeout: float | None, program: str) -> dict[str, Any]:
    order = json.dumps({"folder": folder, "method": text, "protocol": attrs.asdict(protocol)})
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", program], input=order, capture_output=True, text=True, timeout=timeout, check=False
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"method": text, "name": text.partition(":")[0], "error": f"not done after {timeout:g} s"}
    last = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        row = json.loads(last)
        if isinstance(row, dict):
            return row
    except ValueError:
        pass
    told = (done.stderr.strip().splitlines() or ["no word"])[-1]
    return {"method": text, "name": text.partition(":")[0], "error": f"the process ended with code {done.returncode}: {told}"}


def answer(work: Callable[[str, str, Protocol], dict[str, Any]]) -> None:
    """What the process of one row does: the order as JSON from stdin, the row as JSON to stdout. ``work``: (folder, name, protocol) to row."""
    order = json.loads(sys.stdin.read())
    name = order["method"]
    try:
        row = work(order["folder"], name, Protocol(**order["protocol"]))
    except (TersorError, ImportError) as error:
        row = {"method": name, "name": name.partition(":")[0], "error": f"{type(error).__name__}: {error}"}
    sys.stdout.write("\n" + json.dumps(row) + "\n")


def frontier(rows: Iterable[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The rows that no other row beats in bits and in perplexity on ``text`` at once, by bits."""
    best = math.inf
    out = []
    for row in sorted((r for r in rows if "error" not in r), key=lambda r: (r["bits"], r["perplexity"][text])):
        if row["perplexity"][text] < best:
            best = row["perplexity"][text]
            out.append(row)
    return out


def table(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as they are shown: perplexity columns by text, times against gptq's at the nearest bits, the frontier marked."""
    rows = list(rows)
    texts = list(next((r["perplexity"] for r in rows if "perplexity" in r), {}))
    best = {r["method"] for r in frontier(rows, texts[0])} if texts else set()
    gptq = [r for r in rows if r["name"] == "gptq" and "error" not in r]
    out = []
    for r in sorted(rows, key=lambda r: (r.get("bits", math.inf), r["method"])):
        if "error" in r:
            out.append({"method": r["method"], "error": r["error"]})
            continue
        near = min(gptq, key=lambda g: abs(g["bits"] - r["bits"]), default=None)
        out.append(
            {
                "method": r["method"], "bits": round(r["bits"], 3), **{f"ppl {t}": r["perplexity"][t] for t in texts},
                "best": "*" if r["method"] in best else "", "seconds": r["seconds"], "method_seconds": r["method_seconds"],
                "x gptq": r["seconds"] / near["seconds"] if near and r["seconds"] else "", "peak_MB": "" if r["peak_bytes"] is None else r["peak_bytes"] / 1e6,
                "tokens/s": r["tokens_per_second"], "runs": r["runs"],
            }
        )  # fmt: skip
    return out


def plot(rows: Iterable[dict[str, Any]], path: str | os.PathLike[str], limit: float = 2000.0) -> None:
    """Bits a weight against perplexity (log scale, up to ``limit``), a line for each method and the frontier; .svg, .png or .pdf."""
    matplotlib = _library("matplotlib", "matplotlib", "plotting")
    matplotlib.use("Agg", force=False)
    figures = _library("matplotlib.figure", "matplotlib", "plotting")
    good = [r for r in rows if "error" not in r and r["name"] != "float32"]
    whole_ = [r for r in rows if r["name"] == "float32"]
    if not good:
        raise InputError("nothing to plot: no method gave a row")
    texts = list(good[0]["perplexity"])
    figure = figures.Figure(figsize=(6.4 * len(texts), 5.2), layout="constrained")
    names = sorted({r["name"] for r in good})
    colours = matplotlib.colormaps["tab20"].colors
    markers = "osD^v<>pPX*hd"
    for axis, text in zip(figure.subplots(1, len(texts), squeeze=False)[0], texts):
        for i, name in enumerate(names):
            points = sorted((r["bits"], r["perplexity"][text]) for r in good if r["name"] == name)
            shown = [p for p in points if p[1] <= limit]
            if shown:
                axis.plot(
                    *zip(*shown), marker=markers[i % len(markers)], markersize=5, linewidth=0.8, color=colours[i % 20], label=name
                )
        line = [(r["bits"], r["perplexity"][text]) for r in frontier(good, text) if r["perplexity"][text] <= limit]
        if line:
            axis.step(*zip(*line), where="post", color="black", linewidth=1.2, linestyle=":", label="frontier")
        for r in whole_:
            axis.axhline(r["perplexity"][text], color="grey", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_xlabel("bits a weight, of the written files")
        axis.set_ylabel(f"perplexity, {text}")
        axis.grid(alpha=0.3, which="both")
    figure.axes[-1].legend(fontsize=7, ncols=2)
    figure.savefig(path)


if __name__ == "__main__":
    answer(lambda folder, name, protocol: whole(folder, protocol) if name == "float32" else measure(folder, name, protocol))
