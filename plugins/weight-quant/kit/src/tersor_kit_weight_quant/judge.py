"""What weight quantizers do to a real language model, for their claims: SmolLM2-135M, measured bits, perplexity on two texts.

All 210 linear layers are quantized block by block. WikiText-2, where it is at hand: the first 8,193 tokens of the test split judge,
windows from the later parts of it calibrate. The text that ships with Python (a language reference): 2,049 held-out tokens judge,
windows from other parts of it calibrate. A method is calibrated once, with as many windows of the one as of the other. Bits are those of the written files, 8 * bytes / weights, headers included.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from typing import Any

import attrs
import torch

import tersor
from tersor.api import as_method
from tersor.evidence import Row, data
from tersor.files import atomic_write
from tersor.registry import cache_folder

WINDOW = 512
WIKITEXT, PYTHON = "WikiText-2", "Python's documentation"
_SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536))  # of SmolLM2-135M's linear layers, with how many there are a block
_COUNTS = (2, 2, 2, 1)


@attrs.frozen
class Verdict:
    """``bits``: measured, for each weight of the quantized layers. ``perplexity``: by text. ``seconds``: of quantization, the passes over the
    calibration data included; ``layer_seconds``: what of it the method took."""

    method: str
    bits: float
    perplexity: dict[str, float]
    seconds: float = 0.0
    layer_seconds: float = 0.0


def windows(tokenizer: Any, text: str, count: int, seed: int, skip: tuple[int, int] = (0, 0)) -> list[torch.Tensor]:
    """``count`` windows of 1 x 512 tokens, evenly spread over the text without its characters from ``skip[0]`` to ``skip[1]``."""
    from tersor.model import token_ids

    text = text[: skip[0]] + text[skip[1] :]
    step = len(text) // count
    starts = (i * step + seed % 97 * 13 for i in range(count))
    return [token_ids(tokenizer, text[start : start + WINDOW * 12], WINDOW)[None] for start in starts]


class Judge:
    """Judges methods on SmolLM2-135M; see the module. ``batches``: calibration windows of 512 tokens, of all texts together.

    ``tests``: by text, the tokens that judge. ``known``: by text, ``batches`` windows that may calibrate.
    """

    def __init__(self, seed: int = 0, batches: int = 8) -> None:
        from tersor.model import token_ids

        self.model, tokenizer = data.smollm2()
        self.seed, self.batches = seed, batches
        self.tests: dict[str, torch.Tensor] = {}
        self.known: dict[str, list[torch.Tensor]] = {}
        wikitext, english = data.wikitext2(), data.english_text()
        if wikitext is not None:
            self.tests[WIKITEXT] = token_ids(tokenizer, wikitext, 8193)
            self.known[WIKITEXT] = windows(tokenizer, wikitext, batches, seed, (0, 100_000))
        middle = len(english) // 2
        self.tests[PYTHON] = token_ids(tokenizer, english[middle:], 2049)
        self.known[PYTHON] = windows(tokenizer, english, batches, seed, (middle, middle + 20_000))

    @property
    def calibration(self) -> list[torch.Tensor]:
        """``batches`` windows, as many of each text: those of even number of its own."""
        several = len(self.known)
        return [w for texts in zip(*(known[::several] for known in self.known.values()), strict=True) for w in texts][
            : self.batches
        ]

    @functools.cached_property
    def float32(self) -> dict[str, float]:
        """Perplexity of the model as it is."""
        return self._kept(
            "float32", lambda: Verdict("float32", 32.0, {t: self._perplexity(self.model, t) for t in self.tests})
        ).perplexity

    def _perplexity(self, model: Any, text: str) -> float:
        from tersor.model import perplexity

        return perplexity(model, self.tests[text], window=1024)

    def __call__(self, method: Any, layers: bool = False, recipe: Any = None) -> Verdict:
        """Quantize and measure. ``layers``: with the method's own layers (activation quantization) in the place of the weights."""
        import copy

        from tersor.model import place_layers, quantize
        from tersor.model.board import Stopwatch

        method = as_method(method)
        changed = copy.deepcopy(self.model)
        start = time.perf_counter()
        with Stopwatch() as watch:
            payloads = quantize(changed, method, self.calibration if method.calibration != "none" else [], recipe)
        seconds = time.perf_counter() - start
        bits = 8 * sum(p.nbytes for p in payloads.values()) / sum(p.spec.size for p in payloads.values())
        if layers:
            place_layers(changed, payloads)
        return Verdict(str(method), bits, {t: self._perplexity(changed, t) for t in self.tests}, seconds, watch.seconds)

    def baseline(self, method: Any, bits: float) -> Verdict:
        """The coarsest setting of a method with ``bits`` and ``group_size`` that takes at least ``bits`` bits a weight, measured.

        Results are kept in the cache folder, by method, code and data."""
        method = as_method(method)
        chosen = matched(str(method), round(bits, 4))
        return self._kept(chosen, lambda: self(chosen))

    def _kept(self, name: str, find: Any) -> Verdict:
        import xxhash

        from tersor.model.board import sources_digest

        key = xxhash.xxh3_64()
        key.update(f"{name}|{self.batches}|{self.seed}|{torch.__version__}|".encode())
        key.update(sources_digest(None if name == "float32" else as_method(name)).encode())
        for part in (self.tests, self.known):
            for text, value in part.items():
                key.update(text.encode())
                for ids in value if isinstance(value, list) else [value]:
                    key.update(ids.numpy().tobytes())
        path = cache_folder() / "judge" / f"{key.hexdigest()}.json"
        if path.is_file():
            return Verdict(**json.loads(path.read_text("utf-8")))
        verdict = find()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(attrs.asdict(verdict)).encode())
        return verdict

    def rows(
        self,
        claim: str,
        ours: Verdict,
        other: Verdict,
        margin: float = 0.1,
        slack: float = 0.0,
        note: str = "",
        better: str = "lower",
    ) -> Iterator[Row]:
        """One comparison of perplexities for each text. ``slack``: relative to the other's perplexity."""
        for text in self.tests:
            mine, theirs = ours.perplexity[text], other.perplexity[text]
            noise = "both are noise; " if min(mine, theirs) > 1e4 else ""
            told = f"{ours.bits:.3f} and {other.bits:.3f} bits measured; {noise}float32: {self.float32[text]:.2f}"
            yield Row(
                claim=f"{claim}, {text}",
                metric=f"perplexity, {len(self.tests[text]) - 1} tokens",
                ours=mine,
                baseline=theirs,
                baseline_name=other.method,
                better=better,
                margin=margin,
                slack=slack * theirs,
                note=f"{told}; {note}" if note else told,
            )


@functools.cache
def matched(name: str, bits: float) -> str:
    """The method's string with the whole bits and the group size (or -1) that come to the least measured bits not below ``bits``.

    Sizes are those of files of random matrices of SmolLM2's shapes.
    """
    plain = as_method(name)
    found: list[tuple[float, str]] = []
    for whole in range(max(2, int(bits) - 1), min(8, int(bits) + 1) + 1):
        for group in (-1, 512, 256, 192, 128, 96, 64, 48, 40, 36, 32, 24, 16, 8):
            if whole >= 4 and group <= 32:
                continue  # the model's weights lie on a grid of 4 bits in blocks of 32, so that such groups change next to nothing
            candidate = type(plain).build(**{**plain.settings(), "bits": whole, "group_size": group})
            same_size = type(plain).build(**{**candidate.settings(), "clip": False})  # and faster
            found.append((_measured(same_size), str(candidate)))
    enough = [f for f in found if f[0] >= bits - 1e-4]
    return min(enough)[1] if enough else max(found)[1]


@functools.cache
def _measured(method: Any) -> float:
    g = torch.Generator().manual_seed(0)
    size = weights = 0
    for (rows, columns), count in zip(_SHAPES, _COUNTS, strict=True):
        w = torch.randn(rows, columns, generator=g)
        # a weight whose order of columns is not the plain one, where the order is stored
        gram = torch.diag(torch.rand(columns, generator=g) + 0.5)
        calibration = None if method.calibration == "none" else tersor.Calibration(gram=gram, count=columns)
        size += count * method.quantize(w, calibration).nbytes
        weights += count * rows * columns
    return 8 * size / weights
