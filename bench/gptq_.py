"""GPTQ beside AutoGPTQ's core: the plugin's own benchmark."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from bench.common import Report, Row, Size, missing, quiet


def plugin() -> Any:
    path = Path(__file__).parent.parent / "plugins/weight-quant/gptq/benchmarks/bench_gptq.py"
    spec = importlib.util.spec_from_file_location("bench_gptq", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(size: Size) -> Report:
    module = plugin()
    if size.quick:
        module.SHAPES = ((64, 128, 64),)
    with quiet():
        found = module.bench(rounds=size.pick(1, 3), threads=size.pick((1,), (1, 2)))
    rows = []
    for r in found:
        case = f"{r['case']}, {r['threads']} thread{'s' * (r['threads'] > 1)}"
        if "peer" not in r:
            rows.append(Row(case=case, measure="time", unit="s", ours=r["seconds"], better="lower"))
            continue
        peer = r["peer"]
        rows += [
            Row(case=case, measure="time", unit="s", ours=r["seconds"], peer=peer, theirs=r["peer_seconds"], better="lower", aim=0.5),
            Row(case=case, measure="held-out error", unit="1e-3", ours=1e3 * r["error"], peer=peer, theirs=1e3 * r["peer_error"],
                better="lower", aim=1.0),
        ]  # fmt: skip
    if not any("peer" in r for r in found):
        rows.append(missing("all", "auto-gptq core", "pip install --no-deps auto-gptq==0.7.1"))
    return Report("one layer, Hessian given, codes packed on our side", rows)
