"""Rebuild the shipped states: `python -m tersor_walloc.train image --data FOLDER --minutes 30 --output image.safetensors`.

Photographs: those that scikit-image, scikit-learn and matplotlib ship (never astronaut, coffee, chelsea and china, which the claims
measure on), and every photograph, face.dat of scipy and MP4 clip below FOLDER. The package's README lists the public wheels and
Debian packages that were unpacked there. Audio: every sound file below FOLDER, a tenth of them (by name) held out.
`python -m tersor_walloc.train join a.safetensors b.safetensors --output default.safetensors` puts two domains into one state.
"""

import argparse
import bz2
import hashlib
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tersor_walloc.network import QUALITIES
from tersor_walloc.training import fit_network
from tersor_walloc.walloc import LATENTS, LEVELS

# Below the data folder: drawings and renderings among the wallpapers, screenshots, masks.
NO_PHOTOGRAPH = re.compile(
    r"Flow|Grey|Honeywave|PastelHills|Shell|Volna|SafeLanding|summer_1am|Painting-Colors|analogpattern|screenshot|groot|logo|warty|"
    r"(?<!by)/(gnome|sway|desktop|abstract)/|_1080x1920|\.png$|mask",
    re.IGNORECASE,
)
LONGEST = 1100  # photographs are averaged down to about this many pixels along their longer side


def pictures(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, uint8 H x W x 3) of every training photograph."""
    import matplotlib.cbook
    import skimage.data
    import sklearn.datasets
    from PIL import Image

    for name in ("rocket", "retina", "hubble_deep_field", "immunohistochemistry"):
        yield name, getattr(skimage.data, name)()
    left, right, _ = skimage.data.stereo_motorcycle()
    yield from (("left", left), ("right", right), ("flower", sklearn.datasets.load_sample_image("flower.jpg")))
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        yield "hopper", np.asarray(Image.open(file).convert("RGB"))
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file() or NO_PHOTOGRAPH.search(str(path)):
            continue
        if path.name == "face.dat":
            yield path.name, np.frombuffer(bz2.decompress(path.read_bytes()), np.uint8).reshape(768, 1024, 3)
        elif path.suffix == ".mp4" and path.stem in ("bikes", "bigbuckbunny"):
            import av

            for number, frame in enumerate(av.open(str(path)).decode(video=0)):
                if number % 40 == 0:
                    yield f"{path.name} {number}", frame.to_ndarray(format="rgb24")
        elif path.suffix.lower() in (".jpg", ".jpeg") and path.stat().st_size > 50_000:
            image = Image.open(path).convert("RGB")
            yield path.name, np.asarray(image.reduce(max(1, round(max(image.size) / LONGEST))))


def photographs(folder: Path) -> list[Tensor]:
    """Training images, each once at its size and once at half of it."""
    out = []
    for name, pixels in pictures(folder):
        print(name, pixels.shape)  # noqa: T201
        x = torch.from_numpy(np.array(pixels[..., :3].transpose(2, 0, 1))).float() / 255
        out.append(x)
        if min(x.shape[1:]) >= 260:
            out.append(torch.nn.functional.avg_pool2d(x, 2))
    return out


def sounds(folder: Path) -> list[Tensor]:
    """Training audio, stereo at its own rate; files whose name hashes to 0 modulo 10 are held out."""
    import soundfile

    out = []
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".flac", ".wav", ".ogg") or hashlib.sha256(path.name.encode()).digest()[0] % 10 == 0:
            continue
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        if rate == 44100 and len(samples) >= 16384:
            stereo = samples.T[:2] if samples.shape[1] > 1 else samples.T.repeat(2, 0)
            out.append(torch.from_numpy(np.ascontiguousarray(stereo)).clamp(-1, 1))
    print(len(out), "files,", round(sum(x.shape[1] for x in out) / 44100), "s")  # noqa: T201
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tersor_walloc.train", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("image", "audio", "join"))
    parser.add_argument("states", nargs="*", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--latents", type=int)
    parser.add_argument("--start", type=Path, help="a state whose decoder is to be trained on")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--blocks", type=int, default=4)
    given = parser.parse_args(arguments)
    if given.what == "join":
        save_file({key: value for path in given.states for key, value in load_file(path).items()}, given.output)
        return
    samples = photographs(given.data) if given.what == "image" else sounds(given.data)
    start = time.monotonic()

    def clock() -> Iterator[float]:
        while (over := (time.monotonic() - start) / (60 * given.minutes)) < 1:
            yield over

    history: list[np.ndarray] = []

    def report(step: int, over: float, loss: float, quality: Tensor, bits: Tensor, error: Tensor) -> None:
        history.append(np.stack((np.full(len(quality), loss), quality.numpy(), bits.numpy(), error.numpy())))
        if (step + 1) % 200 == 0:
            values = np.concatenate(history, 1)
            points = []
            for q in range(1, QUALITIES + 1):
                _, _, b, e = values[:, values[1] == q]
                points.append(f"{b.mean():.3f}/{-10 * np.log10(e.mean()):.2f}")
            print(step + 1, f"{over:.3f} {values[0].mean():.4f}", *points, flush=True)  # noqa: T201
            history.clear()

    latents = given.latents or LATENTS[given.what]
    first = {k.split(".", 1)[1]: v for k, v in load_file(given.start).items()} if given.start else None
    state = fit_network(samples, LEVELS[given.what], latents, given.width, given.blocks, clock(), start=first, report=report)
    save_file({f"{given.what}.{key}": value.contiguous() for key, value in state.items()}, given.output)


if __name__ == "__main__":
    main(sys.argv[1:])
