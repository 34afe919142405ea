"""Quantized linear layers at work: torch's int4 and int8 kernels beside float32, dynamic int8 and other libraries' layers; decoded tokens."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import torch

from bench.common import Report, Row, Size, missing, quiet, turns


def layers(width: int) -> dict[str, Any]:
    """A dense layer, and what stands in its place."""
    from tersor import model as M

    torch.manual_seed(0)
    dense = torch.nn.Linear(width, width, bias=False).eval()
    found: dict[str, Any] = {"float32": dense}
    for name, method in (("int4", "rtn:group_size=128"), ("int8", "rtn:bits=8,group_size=-1,sym=true")):
        net = torch.nn.Sequential(copy.deepcopy(dense))
        M.compress_layers(net, method)
        M.pack_layers(net)
        found[name] = net
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is on its way out of torch
        found["torch dynamic int8"] = torch.ao.quantization.quantize_dynamic(
            torch.nn.Sequential(copy.deepcopy(dense)), dtype=torch.qint8
        )
    return found


def quanto(width: int) -> Any:
    from optimum.quanto import freeze, qint4, quantize

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(width, width, bias=False)).eval()
    quantize(net, weights=qint4)
    freeze(net)
    return net


def run(size: Size) -> Report:
    width = size.pick(256, 4096)
    rows = []
    with quiet(), torch.no_grad():
        found = layers(width)
        try:
            found["optimum-quanto int4"] = quanto(width)
        except ImportError:
            rows.append(missing("layers", "optimum-quanto", "pip install --no-deps optimum-quanto"))
        for batch in (1, 32):
            x = torch.randn(batch, width)
            times = turns({name: functools.partial(m, x) for name, m in found.items()}, size.pick(2, 9))
            for ours in ("int4", "int8"):
                for name, seconds in times.items():
                    if name in ("int4", "int8"):
                        continue
                    aim = 0.5 if name == "float32" and batch == 1 else None
                    rows.append(
                        Row(case=f"{width} x {width}, batch {batch}, {ours}", measure="time", unit="ms", ours=1e3 * times[ours],
                            peer=name, theirs=1e3 * seconds, better="lower", aim=aim)
                    )  # fmt: skip
        if not size.quick:
            rows += decoding()
    return Report("linear layers that compute from integer codes", rows)


def decoding() -> list[Row]:
    """SmolLM2-135M, greedy, one sequence."""
    from tersor import data
    from tersor import model as M
    from tersor.model.board import decoded_per_second

    plain = decoded_per_second(data.smollm2()[0], 48)
    rows = []
    for name, method in (("int4", "rtn:group_size=128"), ("int8", "rtn:bits=8,group_size=-1,sym=true")):
        model = data.smollm2()[0]
        M.compress_layers(model, method)
        M.pack_layers(model)
        rows.append(
            Row(case=f"SmolLM2-135M, {name}", measure="decoded", unit="tokens/s", ours=decoded_per_second(model, 48), peer="float32",
                theirs=plain, aim=1.0)
        )  # fmt: skip
    return rows
