"""Global magnitude pruning of as many weights as a ResNet-18 has."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from bench.common import Report, Row, Size, turns
from tersor_kit_pruning import largest


def shapes() -> list[tuple[int, ...]]:
    """The convolutions and the last layer of a ResNet-18: 11.2 million weights."""
    out: list[tuple[int, ...]] = [(64, 3, 7, 7), *[(64, 64, 3, 3)] * 4]
    for before, after in ((64, 128), (128, 256), (256, 512)):
        out += [(after, before, 3, 3), *[(after, after, 3, 3)] * 3, (after, before, 1, 1)]
    return [*out, (512, 1000)]


class Layer(nn.Module):
    """One weight."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)


@torch.no_grad()
def run(size: Size) -> Report:
    import tersor

    g = torch.Generator().manual_seed(0)
    weights = {f"w{i}": torch.randn(s, generator=g) / 8 for i, s in enumerate(size.pick(shapes()[:6], shapes()))}
    count = sum(w.numel() for w in weights.values())
    keep = count // 2
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    method: Any = tersor.pruner("magnitude", keep=0.5)

    def ours() -> None:
        for k, m in largest(weights, keep).items():
            weights[k] * m

    def through_the_method() -> None:
        method.apply(weights, method.prune(weights))

    def peer() -> None:
        layers = [Layer(w) for w in weights.values()]
        prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=count - keep)

    def one_pass() -> None:
        for w in weights.values():
            w * (w.abs() > 0.08)

    seconds = turns(
        {"ours": ours, "method": through_the_method, "peer": peer, "pass": one_pass, "mask": lambda: largest(weights, keep)},
        size.pick(1, 7),
    )
    torch.set_num_threads(before)
    million = count / 1e6
    name = "global_unstructured"

    def row(case: str, key: str, peer_name: str, other: str, aim: float) -> Row:
        return Row(case=case, measure="time", unit="ms", ours=1e3 * seconds[key], peer=peer_name, theirs=1e3 * seconds[other],
                   better="lower", aim=aim)  # fmt: skip

    rows = [
        row("mask and multiply", "ours", name, "peer", 1),
        row("mask and multiply", "ours", "compare and multiply", "pass", 3),
        row("mask alone", "mask", "compare and multiply", "pass", 3),
        row("through tersor.pruner", "method", name, "peer", 1),
        row("through tersor.pruner", "method", "compare and multiply", "pass", 3),
    ]
    return Report(f"half of {million:.1f} million weights in {len(weights)} tensors, one thread", rows)
