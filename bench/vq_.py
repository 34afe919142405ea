"""Finite scalar quantization as a layer: forward, and forward with the gradient of the input."""

from __future__ import annotations

import functools
from typing import Any

import torch

import tersor
from bench.common import Report, Row, Size, missing, there, turns

INSTALL = "pip install einops; pip install --no-deps vector-quantize-pytorch einx torch-einops-utils frozendict loguru"


def forward(layer: Any, x: torch.Tensor) -> None:
    with torch.no_grad():
        layer(x)


def both(layer: Any, x: torch.Tensor) -> None:
    z = x.clone().requires_grad_()
    layer(z)[0].sum().backward()


def run(size: Size) -> Report:
    count, dim = size.pick(1024, 16384), 64
    rows = []
    torch.manual_seed(0)
    x = torch.randn(1, count, dim)
    before = torch.get_num_threads()
    for threads in size.pick((1,), (1, 2)):
        torch.set_num_threads(threads)
        for levels in ((4,) * 5, (4,) * 6, (4,) * 7, (8, 5, 5, 5)):
            layers: dict[str, Any] = {"ours": tersor.quantizer("fsq", levels=levels).layer(dim)}
            if there("vector_quantize_pytorch"):
                from vector_quantize_pytorch import FSQ

                layers["peer"] = FSQ(levels=list(levels), dim=dim)
            for name, call in (("forward", forward), ("forward and backward", both)):
                seconds = turns({k: functools.partial(call, m, x) for k, m in layers.items()}, size.pick(1, 41))
                rates = {k: count / s / 1e6 for k, s in seconds.items()}
                case = f"levels {'x'.join(map(str, levels))}, {threads} thread{'s' * (threads > 1)}"
                rows.append(
                    Row(case=case, measure=name, unit="million vectors/s", ours=rates["ours"],
                        peer="vector-quantize-pytorch FSQ" if "peer" in rates else "", theirs=rates.get("peer"),
                        aim=1 if "peer" in rates else None)
                )  # fmt: skip
    torch.set_num_threads(before)
    if not there("vector_quantize_pytorch"):
        rows.append(missing("all", "vector-quantize-pytorch", INSTALL))
    return Report(f"FSQ layer, {count} vectors of {dim} dimensions, linear maps to and from the levels", rows)
