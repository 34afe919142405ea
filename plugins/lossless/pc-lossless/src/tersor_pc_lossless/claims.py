"""Claims of "Lossless Compression with Probabilistic Circuits": smaller than general codecs, and far faster than evaluating the
whole circuit for every variable."""

from __future__ import annotations

import time

import numpy as np

import tersor
from tersor.errors import ClaimError
from tersor.evidence import Row, claim, data


def _float(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / np.float32(255)


def _mosaic(images: np.ndarray, columns: int) -> np.ndarray:
    """N x 1 x H x W as one image of ``columns`` images a row (N is a multiple of it)."""
    n, _, h, w = images.shape
    return np.ascontiguousarray(
        images.reshape(n // columns, columns, h, w).transpose(0, 2, 1, 3).reshape(1, n // columns * h, columns * w)
    )


def _opponents(images: np.ndarray, columns: tuple[int, ...]) -> dict[str, tuple[float, float]]:
    """Bits per pixel of each opponent: all images in one file (its best settings and layout), a file for each of the first 300."""
    settings = {
        "png": [{}],
        "webp": [{"lossless": True}, {"lossless": True, "quality": 100, "effort": 6}],
        "zstd": [{}, {"level": 19}],
    }

    def size(name: str, settings: dict[str, object], x: np.ndarray) -> int:
        return tersor.codec(name, **settings).encode(np.rint(x * 255).astype(np.uint8).tobytes() if name == "zstd" else x).nbytes

    few, out = images[:300], {}
    for name, choices in settings.items():
        together = min(size(name, choices[-1], _mosaic(images, c)) for c in columns)
        out[name] = 8 * together / images.size, min(8 * sum(size(name, s, x) for x in few) / few.size for s in choices)
    return out


def _compare(what: str, codec: tersor.Codec, images: np.ndarray, columns: tuple[int, ...]) -> list[Row]:
    start = time.perf_counter()
    payload = codec.encode(images)
    middle = time.perf_counter()
    if not np.array_equal(codec.decode(payload.to_bytes()), images):
        raise ClaimError("pc-lossless: the decoded images are not the encoded ones")
    seconds = f"encoded in {middle - start:.1f} s, decoded in {time.perf_counter() - middle:.1f} s"
    few = images[:300]
    single = 8 * sum(codec.encode(x).nbytes for x in few) / few.size
    state = sum(v.nbytes for v in codec.state.values())
    rows = []
    for name, (together, apart) in _opponents(images, columns).items():
        rows.append(
            Row(
                claim=f"fewer bits than {name}, {what}, in one file",
                metric="bits per pixel",
                ours=8 * payload.nbytes / images.size,
                baseline=together,
                baseline_name=f"{name}, mosaic",
                better="lower",
                note=f"{len(images)} images, {seconds}; the circuit itself ({state} bytes) is not in the file, as no codec's tables are",
            )
        )
        rows.append(
            Row(
                claim=f"fewer bits than {name}, {what}, one file each",
                metric="bits per pixel",
                ours=single,
                baseline=apart,
                baseline_name=name,
                better="lower",
                note="the first 300, or all where there are fewer; most of each file is its header",
            )
        )
    return rows


@claim("fewer bits than png, webp and zstd on digits that were not in the training set")
def digits(seed: int) -> list[Row]:
    images = _float(data.digits()[0][:, None])
    codec = tersor.codec("pc-lossless", seed=seed).fit(list(images[:1500]))
    return _compare("297 held-out digits of 8 x 8", codec, images[1500:], (1, 11, 27))


@claim("fewer bits than png, webp and zstd on MNIST, and the paper's figure")
def mnist(seed: int) -> list[Row]:
    path = data.shared("mnist/mnist_dev.npz")
    if path is None:
        return []
    with np.load(path) as sets:
        train, test = _float(sets["x_train"][:, None]), _float(sets["x_test"][:, None])
    codec = tersor.codec("pc-lossless", seed=seed).fit([train])
    rows = _compare("5,000 MNIST test images", codec, test, (10, 50))
    paper = Row(
        claim="the paper's bits per pixel on MNIST",
        metric="bits per pixel",
        ours=rows[0].ours,
        baseline=1.20,
        baseline_name="the paper's hidden Chow-Liu tree",
        better="lower",
        note=f"paper: 60,000 training images and a larger circuit; here: {len(train)} images and {codec.latents} latent states",
    )
    return [*rows, paper]


@claim("faster than evaluating the whole circuit for every variable, the more so the more variables")
def schedules(seed: int) -> list[Row]:
    rng, rows, ratios = np.random.default_rng(seed), [], {}
    greys = [np.rint(p.mean(0) * 255) for p in data.photographs().values()]
    for side in (8, 16, 28):
        corners = [(g, rng.integers(g.shape[0] - side), rng.integers(g.shape[1] - side)) for g in greys for _ in range(200)]
        patches = _float(np.stack([g[i : i + side, j : j + side] for g, i, j in corners])[:, None])
        fitted = tersor.codec("pc-lossless", latents=16, epochs=1, full=0, seed=seed).fit([patches])
        d, seconds, streams = side * side, {}, set()
        evaluations: dict[str, int] = {}
        for schedule in ("tour", "cached", "naive"):
            codec = tersor.codec("pc-lossless", latents=16, epochs=1, full=0, seed=seed, schedule=schedule).with_state(
                fitted.state
            )
            evaluations[schedule] = sum(len(up) + len(down) for up, down, _ in codec.circuit.tree.plan(schedule))
            start = time.process_time()
            streams.add(codec.encode(patches[:32]).parts["stream"].tobytes())
            seconds[schedule] = time.process_time() - start
        if len(streams) != 1:
            raise ClaimError("pc-lossless: the schedules gave different streams")
        ratios[d] = seconds["naive"] / seconds["cached"]
        counts = ", ".join(f"{k} {v}" for k, v in evaluations.items())
        note = f"32 patches of photographs, same stream; node evaluations: {counts}; log2 D = {np.log2(d):.1f}"
        for ours, theirs in (("cached", "naive"), ("tour", "cached")):
            rows.append(
                Row(
                    claim=f"schedule {ours} faster than {theirs}, D = {d}",
                    metric="processor seconds to encode",
                    ours=seconds[ours],
                    baseline=seconds[theirs],
                    baseline_name=theirs,
                    better="lower",
                    note=note,
                )
            )
    growth = Row(
        claim="the gain grows with the number of variables",
        metric="seconds naive / seconds cached",
        ours=ratios[784],
        baseline=ratios[64],
        baseline_name="the same at D = 64",
        better="higher",
        note=", ".join(f"D = {d}: {r:.1f}, D / (2 log2 D) = {d / 2 / np.log2(d):.1f}" for d, r in ratios.items()),
    )
    bound = [
        Row(
            claim=f"schedule {name}: no more than 2 log2 D evaluations for each variable, D = 784",
            metric="node evaluations for each variable",
            ours=evaluations[name] / 784,
            baseline=2 * np.log2(784),
            baseline_name="2 log2 D: up and down a balanced tree",
            better="lower",
            note="the bound of the paper is for balanced circuits; a learned Chow-Liu tree is deeper, whatever its root",
        )
        for name in ("cached", "tour")
    ]
    return [*rows, growth, *bound]
