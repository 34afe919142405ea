"""Loading models from folders, GGUF and ``.tsr`` files, offline."""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from tersor.errors import InputError
from tersor.io import _library
from tersor.registry import cache_folder


@contextlib.contextmanager
def offline() -> Iterator[Any]:
    """transformers, told not to reach for the network and to keep quiet."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformers = _library("transformers", "tersor[model]", "loading a model")
            level = transformers.logging.get_verbosity()
            transformers.logging.set_verbosity_error()
            bars = transformers.logging.is_progress_bar_enabled()
            transformers.logging.disable_progress_bar()
            try:
                yield transformers
            finally:
                transformers.logging.set_verbosity(level)
                if bars:
                    transformers.logging.enable_progress_bar()
    finally:
        if before is None:
            os.environ.pop("HF_HUB_OFFLINE", None)
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def as_folder(path: str | os.PathLike[str]) -> Path:
    """A transformers folder for a model: the folder itself, or the cached conversion of a GGUF file.

    A GGUF file is dequantized to float32 once, which takes half a minute for 135 million weights.
    """
    p = Path(path)
    if p.is_dir():
        if not (p / "config.json").is_file():
            raise InputError(f"{p} has no config.json; a model folder is what transformers' save_pretrained writes")
        return p
    if p.suffix != ".gguf":
        raise InputError(f"{p} is not a model; allowed: a transformers folder or a .gguf file")
    with open(p, "rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{p} is not a GGUF file: it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            target = cache_folder() / "models" / f"{p.stem}-{xxhash.xxh3_64_hexdigest(content)}"
    if (target / "config.json").is_file():
        return target
    with offline() as transformers:
        import torch

        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
            model = transformers.AutoModelForCausalLM.from_pretrained(p.parent, gguf_file=p.name, dtype=torch.float32)
        # the weights are plain float32 now, whatever the loader still says of them
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(p.parent)
        except (OSError, ValueError):
            tokenizer = transformers.AutoTokenizer.from_pretrained(p.parent, gguf_file=p.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            try:
                os.replace(shutil.copytree(folder, f"{folder}-done"), target)
            except OSError:
                shutil.rmtree(f"{folder}-done", ignore_errors=True)
                if not (target / "config.json").is_file():
                    raise
    return target


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def load_model(path: str | os.PathLike[str]) -> tuple[Any, Any]:
    """A transformers causal language model (float32, evaluation mode) and its tokenizer, from a folder or a GGUF file.

    The tokenizer is None where the folder has none. Raises :class:`tersor.InputError`, :class:`tersor.MissingLibraryError`.
    """
    folder = as_folder(path)
    with offline() as transformers:
        import torch

        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        except (ValueError, KeyError, OSError) as error:
            raise InputError(f"{folder} does not load as a transformers causal language model: {_first_line(error)}") from error
        tokenizer = None
        if any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model, tokenizer


def load_compressed(path: str | os.PathLike[str]) -> tuple[Any, Any]:
    """The model and tokenizer in a ``.tsr`` file, ready to run: restored to a temporary folder and loaded."""
    from tersor.api import decompress

    with tempfile.TemporaryDirectory() as folder:
        decompress(path, Path(folder, "model"))
        model, tokenizer = load_model(Path(folder, "model"))
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.clone()
    return model, tokenizer
