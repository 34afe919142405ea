"""The paper's claims on SmolLM2-135M: better than a scale for each output, as good as groups of 64 in fewer bits."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from tersor.evidence import Row, claim

#: "Within a few hundredths": by how much of itself the perplexity may be above that of fixed groups.
NEAR = 0.03


@functools.cache
def _judge(seed: int) -> tuple[Any, Any]:
    """The judge, and its verdict on a method, each found once."""
    from tersor_kit_weight_quant.judge import Judge

    judge = Judge(seed)
    return judge, functools.cache(judge)


@claim("perplexity is below that of one scale for each output")
def finer_than_rows(seed: int) -> Iterator[Row]:
    """At 4 and 3 bits, and at 4 bits where only matrices with outliers are split."""
    judge, verdict = _judge(seed)
    for bits in (4, 3):
        row = verdict(f"rtn:bits={bits},sym=true,group_size=-1")
        yield from judge.rows(f"below one scale a row at {bits} bits", verdict(f"finequant:bits={bits}"), row)
        if bits == 4:
            some = verdict("finequant:alpha=0.1")
            yield from judge.rows("below one scale a row at 4 bits, only matrices with outliers split", some, row)


@claim("perplexity is within 3 % of fixed groups of 64, at fewer bits")
def near_fixed_groups(seed: int) -> Iterator[Row]:
    """Measured bits, then perplexity on each text."""
    judge, verdict = _judge(seed)
    for bits in (4, 3):
        ours, fixed = verdict(f"finequant:bits={bits}"), verdict(f"rtn:bits={bits},sym=true,group_size=64")
        yield Row(
            claim=f"fewer bits than groups of 64 at {bits} bits",
            metric="bits per weight of all 210 files",
            ours=ours.bits,
            baseline=fixed.bits,
            baseline_name=fixed.method,
            better="lower",
        )
        yield from judge.rows(f"within {NEAR:.0%} of groups of 64 at {bits} bits", ours, fixed, margin=0.0, slack=NEAR)


@claim("with clip search, perplexity is below rtn with clip search at equal bits")
def clipped(seed: int) -> Iterator[Row]:
    """Not a claim of the paper's, which searches no ranges."""
    judge, verdict = _judge(seed)
    for bits in (4, 3):
        ours = verdict(f"finequant:bits={bits},clip=true,sym=false")
        base = judge.baseline("rtn:clip=true", ours.bits)
        yield from judge.rows(f"below rtn with clip search at equal bits, {bits} bits", ours, base)
