"""What the tests of several vector quantizers use."""

import os
import subprocess
import sys

import pytest
import torch

_BEFORE = """
import sys
import torch
import tersor
from torch import distributed

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
"""
_AFTER = """
torch.save(out, f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


@pytest.fixture
def in_two_processes(tmp_path):
    """Run code in two processes of gloo, which know ``torch``, ``tersor`` and their ``rank``: what each of them leaves as ``out``."""

    def go(code):
        workers = [
            subprocess.Popen([sys.executable, "-c", _BEFORE + code + _AFTER, str(tmp_path), str(rank)], stderr=subprocess.PIPE,
                             text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) for rank in range(2)
        ]  # fmt: skip
        for worker in workers:
            _, errors = worker.communicate(timeout=120)
            assert worker.returncode == 0, errors
        return tuple(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))

    return go
