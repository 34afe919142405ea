"""``python -m bench [NAME ...] [--json PATH] [--quick] [--full]``: tables on stdout, progress on stderr."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time

# read when numpy and torch are imported; threads that wait give their core away, as other work may be going on
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from bench.common import Report, Size, say, show

TOPICS = (
    "registry", "container", "entropy", "gptq", "layers", "lowrank", "vq", "pruning", "images", "video", "kv", "decoding", "gradient",
    "equal_info", "setup",
)  # fmt: skip


def run(name: str, size: Size) -> Report:
    """One topic."""
    report: Report = importlib.import_module(f"bench.{name}_").run(size)
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Tersor beside what one would use instead.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"topics: {', '.join(TOPICS)} (default: all)")
    parser.add_argument("--json", metavar="PATH", help="write the figures there too")
    parser.add_argument("--quick", action="store_true", help="small sizes and one round: shows that everything runs")
    parser.add_argument("--full", action="store_true", help="also what takes minutes: setup")
    given = parser.parse_args(arguments)
    wrong = [n for n in given.names if n not in TOPICS]
    if wrong:
        parser.error(f"no topic {', '.join(wrong)}; topics: {', '.join(TOPICS)}")
    names = given.names or [n for n in TOPICS if n != "setup" or given.full]
    size = Size(given.quick, given.full)
    out = {}
    failed = 0
    for name in names:
        say(f"{name} ...")
        start = time.perf_counter()
        try:
            report = run(name, size)
        except Exception as error:  # one topic's failure leaves the others' tables
            failed = 1
            say(f"{name} failed: {type(error).__name__}: {error}")
            out[name] = {"title": "", "error": f"{type(error).__name__}: {error}", "rows": [], "notes": []}
            continue
        say(f"{name}: {time.perf_counter() - start:.0f} s")
        sys.stdout.write(show(name, report) + "\n")
        sys.stdout.flush()
        out[name] = {"title": report.title, "rows": [r.asdict() for r in report.rows], "notes": report.notes}
    if given.json:
        machine = {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "quick": size.quick,
        }
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({**machine, "load": list(os.getloadavg()), "topics": out}, file, indent=1)
    return failed


if __name__ == "__main__":
    sys.exit(main())
