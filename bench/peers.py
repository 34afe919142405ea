"""Other libraries' weight quantizers on a whole model, for the leaderboard: ``hqq``, ``optimum-quanto``, ``torchao``, ``GPTQModel``.

Each gets the model, the calibration and the text of every row, quantizes the linear layers of the blocks, and is run from what it
makes. Bits are those of the tensors that it keeps for a layer (codes, scales, zero points), files having more. Run by the leaderboard,
one process for each row.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from tersor.model import board

#: Settings that each library has on a CPU. 2 bits are left out: rounding in groups of 64 has a perplexity of a million there.
ROWS = (
    "hqq:bits=3", "hqq:bits=4", "quanto:bits=4", "torchao:bits=3", "torchao:bits=4", "gptqmodel:bits=3", "gptqmodel:bits=4",
)  # fmt: skip
GROUP = 64  # 576 columns have no groups of 128; quanto and torchao refuse a shorter last group


def linears(model: Any) -> list[tuple[str, Any]]:
    """The linear layers of the blocks, by name."""
    import torch

    from tersor.model.driver import find_blocks

    prefix = find_blocks(model)[0]
    return [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith(f"{prefix}.")]


def put(model: Any, name: str, layer: Any) -> None:
    above, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(above), leaf, layer)


def hqq(model: Any, batches: list[Any], bits: int) -> int:
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    size = 0
    for name, layer in linears(model):
        config = BaseQuantizeConfig(nbits=bits, group_size=GROUP)
        new = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
        put(model, name, new)
        kept = [new.W_q, *(v for v in new.meta.values() if isinstance(v, torch.Tensor))]
        # its scales and zero points are float32 here, where a file would have float16
        size += sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in kept)
    return size


def quanto(model: Any, batches: list[Any], bits: int) -> int:
    import torch
    from optimum.quanto import freeze, qint2, qint4, qint8, quantize

    names = [n for n, _ in linears(model)]
    quantize(model, weights={2: qint2, 4: qint4, 8: qint8}[bits], include=names)
    freeze(model)
    size = 0
    for name in names:
        weight = model.get_submodule(name).weight
        inner, _ = weight.__tensor_flatten__()
        for part in inner:
            t = getattr(weight, part)
            t = getattr(t, "_data", t)
            size += t.numel() * (2 if t.dtype == torch.float32 else t.element_size())
    return size


def torchao(model: Any, batches: list[Any], bits: int) -> int:
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

    names = {n for n, _ in linears(model)}
    config = IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerAxis(0) if bits == 8 else PerGroup(GROUP))
    weights = sum(m.weight.numel() for _, m in linears(model))
    quantize_(model, config, filter_fn=lambda m, n: n in names)
    scales = sum(m.weight.scale.numel() for _, m in linears(model))
    # it keeps a byte for each code here; a file would have ``bits``
    return weights * bits // 8 + 2 * scales


def gptqmodel(model: Any, batches: list[Any], bits: int) -> int:
    """The core of GPTQModel, layer by layer within each block as its own looper goes; symmetric, groups of 128, act_group_aware."""
    import torch

    with silent():
        from gptqmodel.looper.named_module import NamedModule
        from gptqmodel.quantization.config import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ

    from tersor.model.driver import _first_inputs, find_blocks

    size = 0
    prefix, blocks = find_blocks(model)
    with torch.no_grad():
        states, _ = _first_inputs(model, blocks, batches)
        for number, block in enumerate(blocks):
            tasks = {}
            handles = []
            for name, layer in block.named_modules():
                if isinstance(layer, torch.nn.Linear):
                    config = QuantizeConfig(bits=bits, group_size=128)
                    named = NamedModule(layer, name=name, full_name=f"{prefix}.{number}.{name}", layer_index=number)
                    tasks[name] = task = GPTQ(named, config)
                    task.quantizer.configure(perchannel=True)
                    handles.append(layer.register_forward_hook(lambda _, x, y, task=task: task.add_batch(x[0].data, y.data)))
            for args, kwargs in states:
                block(*args, **kwargs)
            for handle in handles:
                handle.remove()
            for name, task in tasks.items():
                with silent():
                    weight, scale, zero, *_ = task.quantize(blocksize=128)
                layer = block.get_submodule(name)
                layer.weight.copy_(weight.to(layer.weight))
                size += layer.weight.numel() * bits // 8 + scale.numel() * 2 + zero.numel() * bits // 8
            for i, (args, kwargs) in enumerate(states):
                out = block(*args, **kwargs)
                states[i] = ((out[0] if isinstance(out, tuple) else out, *args[1:]), kwargs)
    return size


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Banners and progress of others go nowhere."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


PEERS: dict[str, Callable[[Any, list[Any], int], int]] = {
    "hqq": hqq,
    "quanto": quanto,
    "torchao": torchao,
    "gptqmodel": gptqmodel,
}


def work(folder: str, name: str, protocol: board.Protocol) -> dict[str, Any]:
    """One row."""
    library, _, setting = name.partition(":bits=")

    def change(model: Any, batches: list[Any]) -> tuple[float, float, Callable[[], str]]:
        weights = sum(m.weight.numel() for _, m in linears(model))
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            size = PEERS[library](model, batches, int(setting))
        dense = library == "gptqmodel"  # its kernels are for GPUs
        return 8 * size / weights, time.perf_counter() - start, lambda: "decoded weights" if dense else "its layers"

    row = board.measured(folder, name, protocol, library == "gptqmodel", change)
    row["peer"] = True
    return row


if __name__ == "__main__":
    board.answer(work)
