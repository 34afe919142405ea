"""``make leaderboard``: every installed weight quantizer, and other libraries', on SmolLM2-135M; writes docs/leaderboard/weight-quant.*"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tersor.files import atomic_write

OUT = Path(__file__).parent.parent / "docs" / "leaderboard"

HEAD = """# Leaderboard of weight quantizers

SmolLM2-135M-Instruct (float32, out of a Q4_1 file: its weights lie on a grid of 4 bits in blocks of 32, which no row uses), its 210
linear layers. Made by `make leaderboard`; on a model of your own: `tersor bench MODEL --kind quantizer`.

{protocol}

Bits are those of the written files, scales, codebooks, outliers, masks and headers included, for each quantized weight. A star marks rows that
no other beats in bits and perplexity at once. Times: {threads} thread(s) of {machine}, with one thread processor time; `method s` is the method's own work, the rest being passes of the calibration data;
`x gptq` compares whole times with gptq's row at the nearest bits. Peak memory is beyond the loaded model. `tokens/s` are decoded greedily, one sequence, by what `runs`
says. Rows in italics are other libraries, in groups of 64 where they refuse a shorter last group; their bits are counted from the tensors that they keep. Differences below
10 % in perplexity mean little on {tokens} tokens.

"""


def markdown(rows: list[dict[str, Any]], protocol: Any) -> str:
    from tersor.model import board

    shown = board.table(rows)
    peers = {r["method"] for r in rows if r.get("peer")}
    keys = list(dict.fromkeys(k for r in shown for k in r if k != "error"))
    lines = ["| " + " | ".join(keys).replace("_", " ") + " |", "|" + "---|" * len(keys)]
    for r in shown:
        if "error" in r:
            continue
        cells = [cell(r.get(k, "")) for k in keys]
        if r["method"] in peers:
            cells[0] = f"*{cells[0]}*"
        else:
            cells[0] = f"`{cells[0]}`"
        lines.append("| " + " | ".join(cells) + " |")
    failed = [f"- `{r['method']}`: {r['error']}" for r in shown if "error" in r]
    told = (
        f"Calibration: {protocol.samples} windows of {protocol.window} tokens; judged on the first {protocol.tokens - 1:,} tokens of "
        f"{' and the first 2,048 of '.join(protocol.texts)}, in windows of 1,024."
    )
    if "WikiText-2" in protocol.texts:
        told += " Calibration is from later parts of WikiText-2's test split than those that judge."
    head = HEAD.format(
        protocol=told, threads=os.environ["OMP_NUM_THREADS"], machine=processor(), tokens=f"{protocol.tokens - 1:,}"
    )
    text = head + "![Bits against perplexity](weight-quant.svg)\n\n" + "\n".join(lines) + "\n"
    return text + ("\nNot measured:\n\n" + "\n".join(failed) + "\n" if failed else "")


def cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return (
        f"{value:.3g}"
        if abs(value) >= 1e4 or (value and abs(value) < 1)
        else f"{value:.2f}"
        if abs(value) < 100
        else f"{value:.0f}"
    )


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.leaderboard", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these methods or peers (the page is then only printed)")
    parser.add_argument("--samples", type=int, default=8, help="calibration windows of 512 tokens (8)")
    parser.add_argument("--tokens", type=int, default=8193, help="tokens of the text that judge (8193)")
    parser.add_argument("--no-peers", action="store_true", help="leave other libraries out")
    parser.add_argument(
        "--part", metavar="K/N", help="only every N-th row, from the K-th: several runs beside one another fill one cache"
    )
    given = parser.parse_args(arguments)
    from bench import peers
    from tersor import data
    from tersor.model import board
    from tersor.progress import on_terminal

    protocol = board.standard(given.samples, given.tokens)
    chosen = [n for n in given.names if n not in peers.ROWS]
    methods = board.configurations(board.BITS, chosen or None) if chosen or not given.names else []
    others = {p: "bench.peers" for p in peers.ROWS if p in given.names or not (given.no_peers or given.names)}
    if given.part:
        k, n = map(int, given.part.split("/"))
        mine = [*methods, *others][k - 1 :: n]
        methods, others = [m for m in methods if m in mine], {p: v for p, v in others.items() if p in mine}
    rows = []
    start = time.perf_counter()
    with on_terminal():
        for row in board.run(data.smollm2_file(), methods, protocol, peers=others, timeout=3600):
            rows.append(row)
            told = (
                row.get("error")
                or f"{row['bits']:.3f} bits, {next(iter(row['perplexity'].values())):.2f}, {row['seconds']:.0f} s"
            )
            sys.stderr.write(
                f"{time.perf_counter() - start:6.0f} s  {row['method']}: {told}{' (kept)' if row.get('cached') else ''}\n"
            )
    page = markdown(rows, protocol)
    if given.names or given.part:
        sys.stdout.write(page)
        return 0
    OUT.mkdir(parents=True, exist_ok=True)
    board.plot(rows, OUT / "weight-quant.svg")
    kept = [{k: v for k, v in r.items() if k != "cached"} for r in rows]
    for name, text in (("weight-quant.md", page), ("weight-quant.json", json.dumps(kept, indent=1) + "\n")):
        with atomic_write(OUT / name) as file:
            file.write(text.encode())
    sys.stdout.write(f"{OUT / 'weight-quant.md'}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
