"""Pixels to Pillow's encoders and back."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image, features

from tersor import CorruptPayloadError, InputError, MissingLibraryError, Spec

__all__ = ["decode_image", "encode_image", "require"]

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def require(feature: str, who: str) -> None:
    """Raise :class:`tersor.MissingLibraryError` unless the installed Pillow has an encoder (``avif``, ``jpg_2000``, ``webp``)."""
    if not features.check(feature):
        raise MissingLibraryError(f"{who} needs Pillow built with {feature}, which this one is not: pip install -U pillow")


def encode_image(
    x: np.ndarray, who: str, file_format: str, channels: tuple[int, ...], on_grid: bool = False, **options: Any
) -> bytes:
    """The file that Pillow writes for a float32 C x H x W image in [0, 1], rounded to 8 bits.

    ``channels``: numbers of channels that the format takes; ``on_grid``: refuse values that are not on the grid k / 255.
    Raises :class:`tersor.InputError`.
    """
    if x.shape[0] not in channels:
        allowed = ", ".join(f"{c} ({_MODES[c]})" for c in channels)
        raise InputError(f"{who} takes images of {allowed} channels; given: {x.shape[0]} (shape {tuple(x.shape)})")
    scaled = x * np.float32(255)
    pixels = np.rint(scaled).astype(np.uint8)
    if on_grid and not np.array_equal(pixels.astype(np.float32) / np.float32(255), x):
        raise InputError(
            f"{who} keeps images of 8-bit values exactly (k / 255 as float32); given: other values; round them first"
        )
    image = Image.fromarray(pixels[0] if x.shape[0] == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    out = io.BytesIO()
    try:
        image.save(out, format=file_format, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"{who} cannot encode an image of shape {tuple(x.shape)}: {error}") from error
    return out.getvalue()


def decode_image(raw: bytes, spec: Spec, file_format: str) -> np.ndarray:
    """The float32 C x H x W image in a file that :func:`encode_image` wrote; the size is checked before it is decoded."""
    channels, height, width = spec.shape
    if channels not in _MODES:
        raise CorruptPayloadError(f"an image of {channels} channels")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(raw), formats=[file_format]) as image:
            if image.size != (width, height):
                raise CorruptPayloadError(f"the image is {image.size[0]} x {image.size[1]}, the header says {width} x {height}")
            pixels = np.asarray(image.convert(_MODES[channels]) if image.mode != _MODES[channels] else image)
    if channels == 1:
        pixels = pixels[..., None]
    return pixels.transpose(2, 0, 1).astype(np.float32, order="C") / np.float32(255)
