"""Time and held-out error of gptq beside AutoGPTQ's own core, in turns, in one process.

    python bench_gptq.py

The peer is the file ``quantization/gptq.py`` of auto-gptq 0.7.1, loaded alone (the package as a whole no longer imports);
``pip install --no-deps auto-gptq==0.7.1`` puts it there. Without it the rows say so. Both sides get X'X and give the quantized
layer; ours also packs the codes. Errors are |X(W - Q)'|^2 / |XW'|^2 on rows that were not calibrated with.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tersor

SHAPES = ((1536, 576, 64), (4096, 4096, 128))  # out, in, group size


def layer(out: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, 2048 calibration rows and 1024 others: activations of low rank plus noise, a few channels ten times larger."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(columns // 8, columns, generator=g) / (columns // 8) ** 0.5
    x = torch.randn(3072, columns // 8, generator=g) @ mix + 0.3 * torch.randn(3072, columns, generator=g)
    x[:, torch.randperm(columns, generator=g)[: columns // 100]] *= 10
    return 0.02 * torch.randn(out, columns, generator=g), x[:2048], x[2048:]


def auto_gptq() -> Any:
    """The peer's class, or None where auto-gptq is not installed."""
    found = importlib.util.find_spec("auto_gptq")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0], "quantization")
    package = types.ModuleType("auto_gptq_core")
    package.__path__ = [str(folder)]
    sys.modules["auto_gptq_core"] = package
    torch.cuda.synchronize = lambda *_: None  # the peer calls it on any device
    return importlib.import_module("auto_gptq_core.gptq").GPTQ


def run_peer(core: Any, w: Tensor, gram: Tensor, bits: int, group: int) -> tuple[float, Tensor]:
    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight.data = w.clone()
    job = core(linear)
    job.quantizer.configure(bits, perchannel=True, sym=False, mse=False)
    job.H, job.nsamples = gram.clone(), 2048
    start = time.perf_counter()
    job.fasterquant(blocksize=128, percdamp=0.01, group_size=group, actorder=True)
    return time.perf_counter() - start, linear.weight.data


def run_ours(w: Tensor, gram: Tensor, bits: int, group: int) -> tuple[float, Tensor]:
    gptq = tersor.quantizer("gptq", bits=bits, group_size=group)
    start = time.perf_counter()
    codes = gptq.quantize(w, tersor.Calibration(gram=gram, count=2048))
    return time.perf_counter() - start, gptq.dequantize(codes)


@torch.no_grad()
def bench(rounds: int = 3, threads: tuple[int, ...] = (1, 2)) -> list[dict[str, Any]]:
    """One row for each shape, number of bits and threads: seconds (medians), errors, and the peer's seconds over ours."""
    peer = auto_gptq()
    before = torch.get_num_threads()
    rows = []
    for out, columns, group in SHAPES:
        w, x, held_out = layer(out, columns)
        gram, reference = x.T @ x, held_out @ w.T
        for count in threads:
            torch.set_num_threads(count)
            for bits in (4, 3):
                sides: dict[str, Callable[[], tuple[float, Tensor]]] = {
                    "ours": lambda bits=bits: run_ours(w, gram, bits, group)  # type: ignore[misc]  # noqa: B023
                }
                if peer is not None:
                    sides["auto-gptq core"] = lambda bits=bits: run_peer(peer, w, gram, bits, group)  # type: ignore[misc]  # noqa: B023
                times: dict[str, list[float]] = {name: [] for name in sides}
                errors = {}
                for _ in range(rounds):
                    for name, run in sides.items():
                        seconds, q = run()
                        times[name].append(seconds)
                        errors[name] = float((held_out @ q.T - reference).square().sum() / reference.square().sum())
                row: dict[str, Any] = {
                    "case": f"gptq {out}x{columns}, {bits} bits, groups of {group}, act order, asymmetric",
                    "threads": count,
                    "seconds": statistics.median(times["ours"]),
                    "error": errors["ours"],
                }
                if peer is None:
                    row["note"] = "no peer: pip install --no-deps auto-gptq==0.7.1"
                else:
                    row["peer"] = "auto-gptq core"
                    row["peer_seconds"] = statistics.median(times["auto-gptq core"])
                    row["peer_error"] = errors["auto-gptq core"]
                    row["speedup"] = row["peer_seconds"] / row["seconds"]
                rows.append(row)
    torch.set_num_threads(before)
    return rows


if __name__ == "__main__":
    for row in bench():
        sys.stdout.write(json.dumps(row) + "\n")
