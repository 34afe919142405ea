"""What the paper claims, on SmolLM2-135M and an editing task made of English text that ships with Python."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import tersor
from tersor.evidence import Row, claim, data

_SHOT = (
    "Copy the text and correct the spelling.\n\nText: The compiler reads teh source file and checks it.\n"
    "Corrected: The compiler reads the source file and checks it.\n\n"
)


def editing_task(seed: int, passages: int) -> list[tuple[str, str]]:
    """(prompt, text to copy): a passage with a few letters exchanged, and the request to correct it."""
    rng = np.random.default_rng(seed)
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", data.english_text())]
    good = [p for p in paragraphs if 250 < len(p) < 450 and not re.search(r"[*`|{}>=_\\]", p)]
    tasks = []
    for p in (good[int(i)] for i in rng.choice(len(good), passages, replace=False)):
        words = p.split(" ")
        for at in rng.choice(len(words), max(2, len(words) // 15), replace=False):
            w = words[at]
            if len(w) > 4:
                words[at] = w[0] + w[2] + w[1] + w[3:]
        wrong = " ".join(words)
        tasks.append((f"{_SHOT}Text: {wrong}\nCorrected:", f" {wrong}\n"))
    return tasks


def measure(model: Any, tokenizer: Any, tasks: list[tuple[str, str]], budget: int = 110, **config: Any) -> dict[str, float]:
    """Totals over the tasks: tokens, calls and seconds of greedy and of aggressive decoding, and equal outputs."""
    greedy, aggressive = tersor.decoder("greedy"), tersor.decoder("aggressive-decoding", **config)
    totals = dict.fromkeys(("equal", "tokens", "calls", "greedy_calls", "seconds", "greedy_seconds"), 0.0)
    for prompt, text in tasks:
        ids, copied = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, text))
        options: dict[str, Any] = {"input_tokens": copied}
        if config.get("form") == "generalized":
            options = {"draft": suffix_draft}
        ours = aggressive.decode(model, ids, budget, **options)
        theirs = greedy.decode(model, ids, budget)
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
    """IAD on spelling correction, where the output mostly copies the input."""
    model, tokenizer = data.smollm2()
    tasks = editing_task(seed, 6)
    totals = measure(model, tokenizer, tasks)
    return _rows("input-guided", totals, len(tasks), f"{int(totals['tokens'])} tokens over {len(tasks)} passages")


@claim("generalized: identical tokens, fewer calls, faster")
def generalized(seed: int) -> list[Row]:
    """GAD with a drafter that has no weights, in place of the paper's trained non-autoregressive model."""
    model, tokenizer = data.smollm2()
    tasks = editing_task(seed + 1, 4)
    totals = measure(model, tokenizer, tasks, form="generalized", block=16)
    return _rows("generalized", totals, len(tasks), "drafts: what followed the last two tokens when they last occurred")
