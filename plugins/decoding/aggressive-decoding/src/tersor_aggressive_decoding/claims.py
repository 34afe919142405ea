"""What the paper claims, on SmolLM2-135M and an editing task made of English text that ships with Python."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

import tersor
from tersor.evidence import Row, claim, data
from tersor.model import TransformersSource


def sentences() -> list[str]:
    """Plain sentences of the Python language reference, of 90 to 260 characters."""
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", data.english_text())]
    found = [s for p in paragraphs for s in re.split(r"(?<=\.) ", p) if 90 < len(s) < 260]
    return [s for s in found if s[0].isupper() and s.endswith(".") and not re.search(r"[*`|{}>=_\\\"]", s)]


def misspell(sentence: str, rng: np.random.Generator) -> str:
    """The sentence with two letters of one word exchanged."""
    words = sentence.split(" ")
    at = int(rng.choice([i for i, w in enumerate(words) if len(w) > 4 and w.isalpha()] or [0]))
    words[at] = words[at][0] + words[at][2:3] + words[at][1:2] + words[at][3:]
    return " ".join(words)


def editing_task(seed: int, count: int) -> list[tuple[str, str]]:
    """(prompt, text to copy): a misspelt sentence to be written again, after three that show how."""
    rng = np.random.default_rng(seed)
    everything = sentences()
    chosen = [everything[int(i)] for i in rng.choice(len(everything), count + 3, replace=False)]
    shown = "".join(f"Wrong: {misspell(s, rng)}\nRight: {s}\n\n" for s in chosen[:3])
    wrong = [misspell(s, rng) for s in chosen[3:]]
    return [(f"{shown}Wrong: {w}\nRight:", f" {w}\n") for w in wrong]


def line_source(model: Any, tokenizer: Any) -> TransformersSource:
    """The model as a source whose output ends with its line."""
    newline = [i for i in range(tokenizer.vocab_size) if "\n" in tokenizer.decode([i])]
    return TransformersSource(model, stop=[*newline, tokenizer.eos_token_id])


def measure(model: Any, tokenizer: Any, tasks: list[tuple[str, str]], budget: int = 100, **config: Any) -> dict[str, float]:
    """Totals over the tasks: tokens, calls and seconds of greedy and of aggressive decoding, and equal outputs."""
    greedy, aggressive = tersor.decoder("greedy"), tersor.decoder("aggressive-decoding", **config)
    source = line_source(model, tokenizer)
    totals = dict.fromkeys(("equal", "tokens", "calls", "greedy_calls", "seconds", "greedy_seconds"), 0.0)
    for prompt, text in tasks:
        ids, copied = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, text))
        options: dict[str, Any] = {"input_tokens": copied}
        if config.get("form") == "generalized":
            options = {"draft": suffix_draft}
        ours = aggressive.decode(source, ids, budget, **options)
        theirs = greedy.decode(source, ids, budget)
        totals["equal"] += np.array_equal(ours.tokens, theirs.tokens)
        totals["tokens"] += len(theirs.tokens)
        totals["calls"] += ours.calls
        totals["greedy_calls"] += theirs.calls
        totals["seconds"] += ours.seconds
        totals["greedy_seconds"] += theirs.seconds
    return totals


def suffix_draft(tokens: Sequence[int], block: int) -> list[int]:
    """A drafting model without weights: what followed the last two tokens when they last occurred."""
    array = np.asarray(tokens)
    places = np.flatnonzero((array[:-2] == array[-2]) & (array[1:-1] == array[-1]))
    return [int(t) for t in array[places[-1] + 2 : places[-1] + 2 + block]] if places.size else []


def _rows(form: str, totals: dict[str, float], count: int, note: str) -> list[Row]:
    return [
        Row(claim=f"{form}: output identical to greedy decoding", metric="outputs identical", ours=totals["equal"], baseline=count,
            baseline_name="outputs in all", better="higher", tie=True),
        Row(claim=f"{form}: fewer model calls", metric="model calls", ours=totals["calls"], baseline=totals["greedy_calls"],
            baseline_name="greedy", better="lower", note=note),
        Row(claim=f"{form}: faster", metric="seconds", ours=totals["seconds"], baseline=totals["greedy_seconds"],
            baseline_name="greedy", better="lower", note=note),
    ]  # fmt: skip


@claim("input-guided: identical tokens, fewer calls, faster")
def input_guided(seed: int) -> list[Row]:
    """IAD on spelling correction, where the output mostly copies the input (the model seldom corrects, and so copies more)."""
    model, tokenizer = data.smollm2()
    tasks = editing_task(seed, 12)
    totals = measure(model, tokenizer, tasks)
    return _rows("input-guided", totals, len(tasks), f"{int(totals['tokens'])} tokens over {len(tasks)} sentences")


@claim("generalized: identical tokens, fewer calls, faster")
def generalized(seed: int) -> list[Row]:
    """GAD with a drafter that has no weights, in place of the paper's trained non-autoregressive model."""
    model, tokenizer = data.smollm2()
    tasks = editing_task(seed + 1, 8)
    totals = measure(model, tokenizer, tasks, form="generalized", block=16)
    return _rows("generalized", totals, len(tasks), "drafts: what followed the last two tokens when they last occurred")
