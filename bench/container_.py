"""Files of many tensors on a memory file system: gigabytes a second, every byte read touched."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import Report, Row, Size, missing, there, turns
from tersor import container
from tersor.arrays import from_buffer


def touch(values: Any) -> None:
    for v in values:
        np.asarray(v).sum()


def contestants(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Name to (write, read and touch)."""
    from safetensors.torch import load_file, save_file

    arrays = {k: v.numpy() for k, v in tensors.items()}
    header = container.Header(kind="model", method="bench", distribution="tersor-bench", version="1")

    def read_ours(verify: bool) -> None:
        head, parts = container.read(folder / "ours", verify)
        touch([from_buffer(p.dtype, p.shape, parts[p.name], "torch") for p in head.parts])

    def read_npz() -> None:
        with np.load(folder / "npz.npz") as file:
            touch([file[k] for k in file.files])

    out: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "ours": (lambda: container.write(folder / "ours", header, tensors), lambda: read_ours(True)),
        "ours, unverified": (lambda: None, lambda: read_ours(False)),
        "safetensors": (
            lambda: save_file(tensors, folder / "safetensors"),
            lambda: touch(load_file(folder / "safetensors").values()),
        ),
        "np.savez": (lambda: np.savez(folder / "npz.npz", **arrays), read_npz),
        "torch.save": (
            lambda: torch.save(tensors, folder / "torch"),
            lambda: touch(torch.load(folder / "torch", mmap=True).values()),
        ),
    }
    if there("zarr"):
        import zarr

        def write_zarr() -> None:
            group = zarr.open_group(folder / "zarr", mode="w")
            for name, a in arrays.items():
                group.create_array(name, data=a, chunks=a.shape, compressors=None)

        def read_zarr() -> None:
            group = zarr.open_group(folder / "zarr", mode="r")
            touch([group[name][:] for name in arrays])

        out["zarr, uncompressed"] = (write_zarr, read_zarr)
    return out


def run(size: Size) -> Report:
    megabytes = size.pick(64, 500)
    home = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    rng = np.random.default_rng(0)
    each = megabytes * 1_000_000 // 40 // 4
    tensors = {f"layer.{i}": torch.from_numpy(rng.standard_normal(each, np.float32)) for i in range(40)}
    total = 40 * each * 4 / 1e9
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=home) as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < 7 * total * 1e9:
            raise OSError(f"{folder} has not the {7 * total:.1f} GB free that this needs")
        sides = contestants(folder, tensors)

        def fresh(n: str) -> None:
            for path in folder.glob({"np.savez": "npz*"}.get(n, n.split(",")[0].removesuffix(".save") + "*")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

        def write(n: str) -> float:
            import time

            fresh(n)
            start = time.perf_counter()
            sides[n][0]()
            return time.perf_counter() - start

        rounds = size.pick(1, 5)
        writes = turns({n: functools.partial(write, n) for n in sides if n != "ours, unverified"}, rounds)
        reads = turns({n: s[1] for n, s in sides.items()}, rounds + 2 * (rounds > 1))
    torch.set_num_threads(before)
    rows = []
    for what, seconds in (("write", writes), ("read", reads)):
        for peer in seconds:
            if peer.startswith("ours"):
                continue
            aim = 0.9 if peer == "safetensors" else None
            rows.append(
                Row(case=what, measure="raw data", unit="GB/s", ours=total / seconds["ours"], peer=peer,
                    theirs=total / seconds[peer], aim=aim)
            )  # fmt: skip
    rows.append(
        Row(case="read, checksum not verified", measure="raw data", unit="GB/s", ours=total / reads["ours, unverified"],
            peer="safetensors", theirs=total / reads["safetensors"])
    )  # fmt: skip
    if not there("zarr"):
        rows.append(missing("write and read", "zarr", "pip install zarr"))
    return Report(f"{megabytes} MB of float32 in 40 tensors, {home or 'temporary folder'}; ours with checksums", rows)
