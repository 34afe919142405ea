"""Safetensors files of a bounded size, as transformers names them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

#: Bytes of tensors that are held in memory, and written as one file.
LIMIT = 1 << 30


class Shards:
    """Writes tensors to ``model.safetensors`` in a folder, or to several files with an index once they exceed ``limit`` bytes."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit
        self.held: dict[str, Tensor] = {}
        self.size, self.total = 0, 0
        self.files: list[list[str]] = []

    def add(self, name: str, value: Tensor) -> None:
        nbytes = value.numel() * value.element_size()
        if self.held and self.size + nbytes > self.limit:
            self._flush()
        self.held[name] = value.contiguous()
        self.size += nbytes
        self.total += nbytes

    def _flush(self) -> None:
        save_file(self.held, self.folder / f"part-{len(self.files)}", metadata={"format": "pt"})
        self.files.append(list(self.held))
        self.held, self.size = {}, 0

    def close(self) -> None:
        """Write what is left, and name the files."""
        self._flush()
        count = len(self.files)
        if count == 1:
            (self.folder / "part-0").rename(self.folder / "model.safetensors")
            return
        index = {}
        for number, names in enumerate(self.files):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"part-{number}").rename(self.folder / final)
            index.update(dict.fromkeys(names, final))
        told = {"metadata": {"total_size": self.total}, "weight_map": index}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", "utf-8")
