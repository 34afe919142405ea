"""``make leaderboard-vq``: every installed learned quantizer in one autoencoder, at equal code bits; writes docs/leaderboard/vq.*"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_NUM_THREADS", "1")

from bench.leaderboard import processor
from tersor.errors import TersorError
from tersor.files import atomic_write

OUT = Path(__file__).parent.parent / "docs" / "leaderboard"

HEAD = """# Leaderboard of vector quantizers

Every installed quantizer with a layer, as the bottleneck of the same autoencoder: vectors of {dim} dimensions for patches of 4 x 4 pixels, {width} channels,
{steps:,} steps of Adam on {batch} crops of {size} x {size} pixels, {seeds} seed(s), about {bits} code bits a vector. Trained on {taught} pictures that scikit-image and
scikit-learn ship, judged on {judged} other photographs{kodak}. Made by `make leaderboard-vq`; rows are kept by method, protocol and code, so that a run
goes on where it was cut off.

Numbers are means over the seeds, of PSNR with the standard deviation. `vector error` is |z - q|^2 relative to the variance of the vectors, which depends on what
the encoder learned; the pictures' PSNR is what counts. `live` is the share of codes in use on the photographs and on the training pictures (mean over the indices of a vector), `perplexity` that of all codes of a
vector together, `order 0` their entropy and `prior` what a learned prior ({prior:,} steps on the codes of the training pictures) needs, both in bits a vector on the
photographs; codes of more than 11 bits have no prior. Seconds are of training, the autoencoder included; with no quantizer it takes {alone:.0f} s and reaches {best:.2f} dB{best_kodak}.
Vectors a second are of the trained layer, in evaluation mode. All on {threads} thread(s) of {machine}{clock}.

"""


def rows_of(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The seeds of each method as one row."""
    from tersor_kit_vq.contest import KODAK, PHOTOGRAPHS, TAUGHT, mean

    out = []
    for method in dict.fromkeys(r["method"] for r in found):
        rows = [r for r in found if r["method"] == method]
        if any("error" in r and "seconds" not in r for r in rows):
            out.append({"method": method, "failed": next(r["error"] for r in rows if "seconds" not in r)})
            continue
        each = [r[PHOTOGRAPHS]["psnr"] for r in rows]
        row: dict[str, Any] = {
            "method": method, "bits": rows[0]["bits"], "psnr": mean(rows, "psnr"), "deviation": float(np.std(each)),
            "psnr_kodak": mean(rows, "psnr", KODAK) if KODAK in rows[0] else None,
        }  # fmt: skip
        row["use_taught"] = mean(rows, "use", TAUGHT) if TAUGHT in rows[0] else None
        row |= {k: mean(rows, k) for k in ("use", "perplexity", "error", "order0", "seconds", "encode", "decode")}
        row["prior_bits"] = None if rows[0]["prior_bits"] is None else mean(rows, "prior_bits")
        out.append(row)
    return sorted(out, key=lambda r: -r.get("psnr", 0.0))


def markdown(rows: Sequence[dict[str, Any]], head: str) -> str:
    titles = ("method", "bits", "PSNR, dB", "PSNR Kodak", "live", "live in training", "perplexity", "vector error", "order 0", "prior", "seconds", "encode, vectors/s", "decode, vectors/s")  # fmt: skip
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for r in rows:
        if "failed" in r:
            continue
        kodak = "" if r["psnr_kodak"] is None else f"{r['psnr_kodak']:.2f}"
        prior = "" if r["prior_bits"] is None else f"{r['prior_bits']:.2f}"
        taught = "" if r["use_taught"] is None else f"{100 * r['use_taught']:.1f} %"
        cells = (f"`{r['method']}`", f"{r['bits']:.2f}", f"{r['psnr']:.2f} ± {r['deviation']:.2f}", kodak, f"{100 * r['use']:.1f} %", taught,
                 f"{r['perplexity']:.0f}", f"{r['error']:.3f}", f"{r['order0']:.2f}", prior, f"{r['seconds']:.0f}", f"{r['encode']:.3g}", f"{r['decode']:.3g}")  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    failed = [f"- `{r['method']}`: {r['failed']}" for r in rows if "failed" in r]
    return (
        head
        + "![Error, bits and use](vq.svg)\n\n"
        + "\n".join(lines)
        + "\n"
        + ("\nNot measured:\n\n" + "\n".join(failed) + "\n" if failed else "")
    )


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Left: bits a vector by the learned prior (order 0 where there is none) against PSNR; middle: live codes; right: seconds of training against
    vectors a second."""
    import matplotlib
    from matplotlib import figure as figures

    matplotlib.use("Agg", force=False)
    good = [r for r in rows if "failed" not in r]
    figure = figures.Figure(figsize=(19, 5.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    colours = matplotlib.colormaps["tab20"].colors
    for i, r in enumerate(good):
        bits, whole = (r["prior_bits"], True) if r["prior_bits"] is not None else (r["order0"], False)
        name, colour = r["method"].partition(":")[0], colours[i % 20]
        left.errorbar(bits, r["psnr"], yerr=r["deviation"], marker="o" if whole else "^", color=colour, markersize=6, capsize=2)
        right.plot(r["seconds"], r["encode"], marker="o", color=colour, markersize=6)
        for axes, at in ((left, (bits, r["psnr"])), (right, (r["seconds"], r["encode"]))):
            axes.annotate(name, at, textcoords="offset points", xytext=(5, 4), fontsize=7)
    left.set_xlabel("bits a vector by the learned prior (triangles: entropy of order 0)")
    left.set_ylabel("PSNR of held-out photographs, dB")
    ordered = sorted(good, key=lambda r: r["use"])
    names = [r["method"].partition(":")[0] + f" {r['bits']:.0f}b" for r in ordered]
    middle.barh(
        range(len(names)), [100 * (r["use_taught"] or 0) for r in ordered], color="lightsteelblue", label="training pictures"
    )
    middle.barh(range(len(names)), [100 * r["use"] for r in ordered], color="tab:blue", tick_label=names, label="photographs")
    middle.legend(fontsize=7)
    middle.set_xlabel("live codes, % (mean over the indices of a vector)")
    middle.tick_params(axis="y", labelsize=7)
    for axes in (left, right):
        axes.margins(x=0.12)
    right.set(yscale="log", xlabel="seconds of training, the autoencoder's included", ylabel="encoded vectors a second")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3, axis="x" if axes is middle else "both")
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.leaderboard_vq", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these methods (the page is then only printed)")
    parser.add_argument("--bits", type=int, default=10, help="code bits a vector (10)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each method (3)")
    parser.add_argument("--steps", type=int, default=None, help="training steps of each")
    parser.add_argument("--quick", action="store_true", help="one seed, 100 steps, no prior; the page is only printed")
    parser.add_argument(
        "--part", metavar="K/N", help="only every N-th row, from the K-th: several runs beside one another fill one cache"
    )
    parser.add_argument("--json", action="store_true", help="rows as JSON in place of the table")
    given = parser.parse_args(arguments)
    import attrs
    import torch

    from tersor.progress import on_terminal
    from tersor_kit_vq.contest import KODAK, PHOTOGRAPHS, Protocol, Unquantized, contestants, pictures, trial

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    protocol = Protocol(steps=100, prior_steps=0) if given.quick else Protocol()
    if given.steps is not None:
        protocol = attrs.evolve(protocol, steps=given.steps)
    seeds = range(1 if given.quick else given.seeds)
    todo = [(m, s) for m in contestants(given.names, given.bits, protocol.dim) for s in seeds]
    if given.part:
        k, n = map(int, given.part.split("/"))
        todo = todo[k - 1 :: n]
    found, start = [], time.perf_counter()
    with on_terminal():
        for method, seed in todo:
            try:
                row = trial(method, seed, protocol)
            except TersorError as error:
                row = {"method": method, "error": f"{type(error).__name__}: {error}"}
            found.append(row)
            told = (
                row.get("error")
                if "seconds" not in row
                else f"{next(v for v in row.values() if isinstance(v, dict))['psnr']:.2f} dB"
            )
            sys.stderr.write(
                f"{time.perf_counter() - start:6.0f} s  {method}, seed {seed}: {told}{' (kept)' if row.get('cached') else ''}\n"
            )
    rows = rows_of(found)
    if given.json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return 0
    threads = torch.get_num_threads()
    alone, (taught, judged) = trial(Unquantized(protocol.dim), 0, protocol), pictures()
    head = HEAD.format(
        **attrs.asdict(protocol) | {"prior": protocol.prior_steps}, seeds=len(seeds), bits=given.bits, threads=threads, machine=processor(),
        taught=len(taught), judged=len(judged[PHOTOGRAPHS]), kodak=f" and {len(judged[KODAK])} of Kodak's" if KODAK in judged else "",
        alone=alone["seconds"], best=alone[PHOTOGRAPHS]["psnr"], best_kodak=f", {alone[KODAK]['psnr']:.2f} dB on Kodak's" if KODAK in judged else "",
        clock=", processor time" if threads == 1 else "",
    )  # fmt: skip
    text = markdown(rows, head)
    sys.stdout.write(text)
    if not (given.names or given.quick or given.part or given.steps):
        OUT.mkdir(parents=True, exist_ok=True)
        plot(rows, OUT / "vq.svg")
        for name, content in (("vq.md", text), ("vq.json", json.dumps(rows, indent=1) + "\n")):
            with atomic_write(OUT / name) as file:
                file.write(content.encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
