"""numpy arrays and torch tensors side by side, without importing torch until somebody else has."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from tersor.errors import InputError, MissingLibraryError

#: Element types that a file can hold; the position is the code in the file, so the list is only ever appended to.
DTYPES = (
    "bytes", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
    "float16", "float32", "float64", "bfloat16", "bool", "complex64",
)  # fmt: skip
SIZES = {
    "bytes": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "uint64": 8, "int64": 8,
    "float16": 2, "float32": 4, "float64": 8, "bfloat16": 2, "bool": 1, "complex64": 8,
}  # fmt: skip


def is_torch(x: Any) -> bool:
    """Whether ``x`` is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def import_torch(why: str) -> Any:
    """torch, or :class:`tersor.MissingLibraryError` that says what needs it."""
    try:
        import torch
    except ImportError as error:
        raise MissingLibraryError(f"{why} needs torch, which is not installed: pip install torch") from error
    return torch


def dtype_name(x: Any) -> str:
    """``float32``, ``bfloat16`` ... of an array or tensor."""
    return str(x.dtype).removeprefix("torch.")


def is_float(name: str) -> bool:
    """Whether the element type is a real floating point type."""
    return name in ("float16", "float32", "float64", "bfloat16")


def to_numpy(x: Any) -> np.ndarray:
    """A numpy array of ``x``, sharing its memory where it can; bfloat16 comes as float32."""
    if is_torch(x):
        x = x.detach().resolve_conj().resolve_neg().cpu()
        return x.float().numpy() if dtype_name(x) == "bfloat16" else x.numpy()
    return np.asarray(x)


def to_torch(x: Any) -> Any:
    """A torch tensor of ``x``, sharing its memory where it can (read-only arrays and negative strides are copied)."""
    torch = import_torch("this method")
    if isinstance(x, torch.Tensor):
        return x.detach().resolve_conj().resolve_neg()
    x = np.asarray(x)
    if not x.flags.writeable or any(s < 0 for s in x.strides) or not x.dtype.isnative:
        x = np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("=")).copy()
    return torch.from_numpy(x)


def to_native(x: Any, native: str) -> Any:
    """``x`` as the array type that a method works in: ``numpy`` or ``torch``."""
    return to_torch(x) if native == "torch" else to_numpy(x)


def cast(x: Any, name: str) -> Any:
    """``x`` with elements of the type ``name``; no copy where it has that type already."""
    if dtype_name(x) == name:
        return x
    if is_torch(x):
        torch = sys.modules["torch"]
        return x.to(getattr(torch, name))
    if name == "bfloat16":
        return to_torch(x).to(import_torch("bfloat16").bfloat16)
    return x.astype(name)


def all_finite(x: Any) -> bool:
    """Whether no element is NaN or infinite. One pass where the sum does not overflow: a finite sum has finite terms."""
    if is_torch(x):
        torch = sys.modules["torch"]
        if not (x.is_floating_point() or x.is_complex()):
            return True
        return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())
    if x.dtype.kind not in "fc":
        return True
    with np.errstate(all="ignore"):
        return bool(np.isfinite(x.sum()) or np.isfinite(x).all())


def buffer(x: Any) -> tuple[str, tuple[int, ...], memoryview]:
    """Element type, shape and raw little-endian bytes of a part (bytes, array or tensor); no copy where it is contiguous."""
    if isinstance(x, (bytes, bytearray, memoryview)):
        view = memoryview(x).cast("B")
        return "bytes", (len(view),), view
    if is_torch(x):
        name, shape = dtype_name(x), tuple(x.shape)
        torch = sys.modules["torch"]
        x = x.detach().cpu().contiguous().reshape(-1)
        if x.numel() == 1 and x.stride() != (1,):  # contiguous to torch, whatever its stride
            x = x.clone(memory_format=torch.contiguous_format)
        array = x.view(torch.uint8).numpy() if x.numel() else np.empty(0, np.uint8)
    else:
        x = np.asarray(x)
        name, shape = x.dtype.name, x.shape
        if sys.byteorder == "big" or not x.dtype.isnative:
            x = x.astype(x.dtype.newbyteorder("<"))
        array = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    if name not in SIZES or name == "bytes":
        raise InputError(f"element type {name} cannot be stored; allowed: {', '.join(DTYPES[1:])}")
    return name, shape, memoryview(array)  # type: ignore[arg-type]


def from_buffer(name: str, shape: tuple[int, ...], view: memoryview, native: str) -> Any:
    """The part stored by :func:`buffer`, as ``native`` array over the same memory; ``bytes`` parts come as bytes."""
    if name == "bytes":
        return bytes(view)
    if native == "torch" or name == "bfloat16":
        torch = import_torch("reading this file")
        count = int(np.prod(shape, dtype=np.int64))
        if count == 0:
            return torch.empty(shape, dtype=getattr(torch, name))
        if view.readonly:
            view = memoryview(bytearray(view))
        return torch.frombuffer(view, dtype=getattr(torch, name), count=count).reshape(shape)
    return np.frombuffer(view, dtype=np.dtype(name).newbyteorder("<")).reshape(shape)
