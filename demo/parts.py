"""The five parts of the demo. Each prints one table and writes its files."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tersor.api
from tersor import data

TITLES = (
    "A language model: SmolLM2-135M through rtn and gptq, groups of 128",
    "A photograph through walloc, jpeg and webp",
    "Handwritten digits, exactly: pc-lossless, png, webp, zstd",
    "Pruning in training: large-sparse against small-dense at equal bytes",
    "Aggressive decoding: SmolLM2 writes misspelt sentences again",
)


def step(text: str) -> None:
    """Progress on standard error."""
    print(f"          {text}", file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Aligned columns on standard output."""
    cells = [list(map(str, r)) for r in [head, *rows]]
    widths = [max(len(r[i]) for r in cells) for i in range(len(head))]
    for row in cells:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


_WRITE = """
import sys
from tersor.model import generate, load_compressed
model, tokenizer = load_compressed(sys.argv[1])
print(generate(model, tokenizer, sys.argv[2], 16).replace("\\n", " "))
"""


def language_model(out: Path) -> None:
    """Weights to a file and back at 4 and 3 bits; perplexity on text that calibration has not seen."""
    from tersor import model as M

    path = data.smollm2_file()
    step("loading SmolLM2-135M (the first time its GGUF file is converted)")
    text = data.english_text()
    calibration, held_out = text[: len(text) // 2], text[len(text) // 2 :]
    model, tokenizer = M.load_model(path)
    ids = M.token_ids(tokenizer, held_out, 2049)
    prompt = "The capital of France is"
    before = M.perplexity(model, ids)
    weights = sum(p.numel() for n, p in model.named_parameters() if "_proj." in n)
    rows = [["float32", "", "32", f"{sum(p.numel() for p in model.parameters()) * 4 / 1e6:.1f}", f"{before:.2f}", "",
             M.generate(model, tokenizer, prompt, 16).replace("\n", " ")]]  # fmt: skip
    del model
    for bits in (4, 3):
        for name in ("rtn", "gptq"):
            step(f"{name}, {bits} bits")
            start = time.time()
            file = out / f"smollm2-{name}-{bits}.tsr"
            tersor.compress(path, f"{name}:bits={bits},group_size=128", file, calibration=calibration, samples=8, window=512)
            seconds = time.time() - start
            told = tersor.inspect(file)
            quantized = sum(p["bytes"] for p in told["parts"] if p["name"].startswith("t:"))
            restored, _ = M.load_compressed(file)
            after = M.perplexity(restored, ids)
            del restored
            done = subprocess.run([sys.executable, "-c", _WRITE, str(file), prompt], capture_output=True, text=True, check=True)
            rows.append([name, bits, f"{8 * quantized / weights:.3f}", f"{told['bytes'] / 1e6:.1f}", f"{after:.2f}", f"{seconds:.0f}",
                         done.stdout.strip()])  # fmt: skip
    table(
        ["method", "bits", "bits/weight", "file MB", "perplexity", "seconds", "written after decompression in a fresh process"],
        rows,
    )
    print(
        f"\nbits/weight: measured on the file, over the {weights / 1e6:.1f} million weights of the linear layers; embedding and norms stay"
        "\nfloat32. Perplexity: 2,048 tokens of the Python language reference; calibration: 8 x 512 tokens of its other half."
        "\nDifferences under 10 % mean nothing on so little text."
    )


def photograph(out: Path) -> None:
    """A photograph that walloc was not trained on: rate, distortion, time."""
    from tersor import bench, io

    name = "astronaut"
    image = data.photographs()[name]
    io.save(image, out / f"{name}.png")
    sweeps = ["walloc:quality=1/2/3/4/5/6/7/8", "jpeg:quality=5/10/20/40/70", "webp:quality=1/10/30/50/80"]
    rows = []
    for text in bench.expand(sweeps):
        step(text)
        rows.append(bench.measure(image, text, repeat=2))
    bench.plot(rows, out / "rate-distortion.svg")
    bench.plot(rows, out / "rate-distortion.png")
    table(
        ["method", "bytes", "bits/pixel", "PSNR dB", "MS-SSIM", "encode s", "decode s"],
        [[r["method"], r["bytes"], f"{r['bits_per_pixel']:.3f}", f"{r['psnr_db']:.2f}", f"{r['ms_ssim']:.4f}",
          f"{r['encode_seconds']:.3f}", f"{r['decode_seconds']:.3f}"] for r in rows],
    )  # fmt: skip
    # at the rate of the smallest JPEG, the nearest of each method
    rate = min(r["bytes"] for r in rows if r["name"] == "jpeg")
    chosen = [min((r for r in rows if r["name"] == n), key=lambda r: abs(r["bytes"] - rate)) for n in ("walloc", "jpeg", "webp")]
    _side_by_side(image, chosen, out / "side-by-side.png")
    for r in chosen:
        m = tersor.api.method(r["method"])
        tersor.compress(image, m, out / f"{name}-{r['name']}.tsr")
    print(f"\nbits/pixel: from the size of the .tsr file. Plot: {out}/rate-distortion.svg; pictures at about {chosen[0]['bits_per_pixel']:.2f}"
          f"\nbits/pixel: {out}/side-by-side.png. walloc's state was trained on other photographs and is not part of the file.")  # fmt: skip


def _side_by_side(image: np.ndarray, rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * (len(rows) + 1), 4.6), layout="constrained")
    for axis, row in zip(figure.subplots(1, len(rows) + 1), [None, *rows], strict=True):
        shown, title = image, "original, 24 bits/pixel"
        if row is not None:
            m: Any = tersor.api.method(row["method"])
            shown = np.asarray(m.decode(m.encode(image))).clip(0, 1)
            title = f"{row['method']}\n{row['bits_per_pixel']:.3f} bits/pixel, {row['psnr_db']:.1f} dB"
        axis.imshow(shown.transpose(1, 2, 0))
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    figure.savefig(path, dpi=90, bbox_inches="tight")


def digits(out: Path) -> None:
    """The digits that the shipped circuit was not fitted on, all in one file for each method."""
    images, _ = data.digits()
    held_out = images[1500:]
    count, pixels = len(held_out), held_out.size
    batch = held_out[:, None].astype(np.float32) / np.float32(255)
    rows_of = 27
    mosaic = held_out.reshape(-1, rows_of, 8, 8).transpose(0, 2, 1, 3).reshape(1, -1, rows_of * 8).astype(
        np.float32
    ) / np.float32(255)
    rows = []
    for text, x in (
        ("pc-lossless", batch),
        ("png", mosaic),
        ("webp:lossless=true,quality=100,effort=6", mosaic),
        ("zstd:level=19", held_out.tobytes()),
    ):
        step(text)
        m: Any = tersor.api.method(text)
        start = time.time()
        payload = m.encode(x)
        encoded = time.time()
        file = out / f"digits-{m.name}.tsr"
        payload.save(file)
        back = tersor.decompress(file)
        exact = bytes(back) == x if isinstance(x, bytes) else np.array_equal(back, x)
        rows.append([text, file.stat().st_size, f"{8 * file.stat().st_size / pixels:.3f}", "yes" if exact else "NO",
                     f"{encoded - start:.2f}", f"{time.time() - encoded:.2f}"])  # fmt: skip
    table(["method", "bytes", "bits/pixel", "exact", "encode s", "decode s"], rows)
    print(f"\n{count} images of 8 x 8 that the circuit has not seen, in one file each; png and webp get them as one mosaic, zstd as bytes."
          "\nThe circuit (279 kB, shipped in the package) is not part of the file.")  # fmt: skip


def pruning(out: Path) -> None:
    """A wide network pruned while it trains against a narrow one whose file is at least as long."""
    from tersor_gradual_magnitude.claims import compare, dataset

    rows = []
    for keep in (0.1, 0.05, 0.025):
        step(f"keep {keep}")
        r = compare(keep, [0, 1], dataset())
        rows.append(
            [
                keep,
                f"{r['bytes']:.0f}",
                f"{100 * r['sparse']:.2f}",
                f"{r['hidden']:.0f}",
                f"{r['dense_bytes']:.0f}",
                f"{100 * r['dense']:.2f}",
            ]
        )
    table(["kept", "sparse bytes", "sparse accuracy %", "dense width", "dense bytes", "dense accuracy %"], rows)
    print(
        "\nscikit-learn's digits, 1,200 to train on and 597 held out; two hidden layers of 256, gradual-magnitude; means of two seeds."
    )


def aggressive(out: Path) -> None:
    """Sentences with a spelling mistake, to be written again: the output mostly copies the input."""
    from tersor_aggressive_decoding.claims import editing_task, line_source

    step("loading SmolLM2-135M")
    model, tokenizer = data.smollm2()
    source = line_source(model, tokenizer)
    rows = []
    totals = np.zeros(5)
    with open(out / "sentences.txt", "w", encoding="utf-8") as file:
        for number, (prompt, text) in enumerate(editing_task(0, 6), 1):
            step(f"sentence {number}")
            ids, copied = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, text))
            ours = tersor.decoder("aggressive-decoding").decode(source, ids, 100, input_tokens=copied)
            greedy = tersor.decoder("greedy").decode(source, ids, 100)
            same = np.array_equal(ours.tokens, greedy.tokens)
            totals += [len(greedy.tokens), greedy.calls, ours.calls, greedy.seconds, ours.seconds]
            rows.append([number, len(greedy.tokens), "yes" if same else "NO", greedy.calls, ours.calls, f"{greedy.seconds:.1f}",
                         f"{ours.seconds:.1f}", f"{greedy.seconds / ours.seconds:.1f}"])  # fmt: skip
            file.write(f"given:   {text.strip()}\nwritten: {tokenizer.decode(ours.tokens).strip()}\n\n")
    tokens, greedy_calls, calls, greedy_seconds, seconds = totals
    rows.append(["all", f"{tokens:.0f}", "", f"{greedy_calls:.0f}", f"{calls:.0f}", f"{greedy_seconds:.1f}", f"{seconds:.1f}",
                 f"{greedy_seconds / seconds:.1f}"])  # fmt: skip
    table(
        ["sentence", "tokens", "identical to greedy", "calls, greedy", "calls", "seconds, greedy", "seconds", "times faster"],
        rows,
    )
    print(
        f"\nInput-guided: the misspelt sentence is what is copied. Seconds include reading the prompt of some 240 tokens. See {out}/sentences.txt."
    )


PARTS: tuple[Callable[[Path], None], ...] = (language_model, photograph, digits, pruning, aggressive)
