"""The paper's claims on SmolLM2-135M at 2 bits: below rounding and GPTQ at the same bits; what the weighting of tokens gives."""

from __future__ import annotations

from collections.abc import Iterator

from tersor.evidence import Row, claim


@claim("the network's perplexity at 2 bits is below those of round-to-nearest and GPTQ at equal measured bits")
def perplexity(seed: int) -> Iterator[Row]:
    """Groups of 64, 32 steps of 256 tokens; both baselines with clip search, in groups that make them as large or larger.

    The two parts, which each take a run of their own, are judged on the text that ships with Python alone.
    """
    from tersor_kit_weight_quant.judge import PYTHON, Judge

    judge = Judge(seed)
    ours = judge("db-llm")
    yield from judge.rows("below gptq with clip search at 2 bits", ours, judge.baseline("gptq:clip=true", ours.bits))
    yield from judge.rows("below rtn with clip search at 2 bits", ours, judge.baseline("rtn:clip=true", ours.bits))
    judge.tests = {PYTHON: judge.tests[PYTHON]}
    yield from judge.rows("distillation below none at 2 bits", ours, judge("db-llm:steps=0"))
    yield from judge.rows("deviation-aware below plain distillation at 2 bits", ours, judge("db-llm:distill=plain"))
