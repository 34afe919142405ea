"""Quantizing layers under DistributedDataParallel, in two real processes with gloo; this file is also what they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest

WORLD, DIM = 2, 8


def methods() -> dict[str, Any]:
    """Each installed quantizer with a layer: one instance for vectors of 8 dimensions."""
    from tersor import registry

    out = {}
    for about in registry.listing():
        if about["kind"] != "quantizer" or "latent" not in about["domain"].split(","):
            continue
        cls = registry.lookup("quantizer", about["name"])
        several = next((m for bits in (6, 8, 10) if (m := getattr(cls, "at_code_bits", lambda *_: [])(bits, DIM))), [])
        out.update((str(m), m) for m in several)
    return out


def train(method: Any, rank: int) -> str:
    """Four steps on batches that differ, one of them empty for the second process; what is not the same in both afterwards."""
    import torch
    from torch import distributed, nn

    torch.manual_seed(0)
    layer = method.layer() if getattr(method, "dim", None) == DIM else method.layer(DIM)
    torch.manual_seed(100 + rank)  # what a layer draws in training differs between processes

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.body, self.layer = nn.Linear(DIM, DIM), layer
            with torch.no_grad():
                self.body.weight.copy_(torch.randn(DIM, DIM, generator=generator))
                self.body.bias.zero_()

        def forward(self, x: Any) -> Any:
            out = self.layer(self.body(x))
            return out.values.square().sum() / 10 + (out.values * x).sum() / 100 + out.loss

    # buffers are not broadcast, which would hide that they differ
    net = nn.parallel.DistributedDataParallel(Net(), broadcast_buffers=False, find_unused_parameters=True)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    before = {k: v.clone() for k, v in net.module.state_dict().items()}
    for step, count in enumerate(((24, 40), (16, 0), (5, 30), (32, 32))):
        generator = torch.Generator().manual_seed(10 * step + rank)
        loss = net(torch.randn(count[rank], DIM, generator=generator) + rank)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wrong, state = [], net.module.state_dict()
    for name, value in state.items():
        others = [torch.zeros_like(value) for _ in range(WORLD)] if rank == 0 else None
        distributed.gather(value.contiguous(), others, 0)
        if others is not None and not all(torch.equal(o, value) for o in others):
            wrong.append(name)
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            wrong.append(f"{name} is not finite")
    moved = any(not torch.equal(before[k], v) for k, v in state.items() if k.startswith("layer."))
    if not moved and any(k.startswith("layer.") for k in state):
        wrong.append("its layer learned nothing")
    return ", ".join(wrong)


def main(rank: int, meeting: str) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    found = {name: train(m, rank) for name, m in methods().items()}
    distributed.barrier()
    if rank == 0:
        sys.stdout.write(json.dumps(found) + "\n")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, str]:
    meeting = tmp_path_factory.mktemp("meeting") / "file"
    runs = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(meeting)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        told = [run.communicate(timeout=300) for run in runs]
    finally:
        for run in runs:
            run.kill()
    for run, (_, errors) in zip(runs, told, strict=True):
        assert run.returncode == 0, errors[-3000:]
    return json.loads(told[0][0].strip().splitlines()[-1])


@pytest.mark.parametrize("name", list(methods()))
def test_layers_stay_the_same_in_all_processes(name, found) -> None:
    assert found[name] == ""


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
