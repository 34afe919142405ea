"""``make demo``: five parts, two at a time, one table each; plots, pictures and files go to demo-out/."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from demo.parts import PARTS, TITLES

OUT = Path("demo-out")


def main() -> int:
    """Run each part in a process of its own; print their progress as it comes and their tables in order."""
    if len(sys.argv) > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        PARTS[int(sys.argv[1]) - 1](OUT)
        return 0
    start = time.time()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    queue = [[1], [2, 3, 4, 5]] if (os.cpu_count() or 1) > 1 else [[1, 2, 3, 4, 5]]
    running: dict[int, subprocess.Popen[bytes]] = {}
    failed = []
    printed = 0
    finished: set[int] = set()
    while queue or running:
        for lane in [lane for lane in queue if not any(n in running for n in lane)]:
            number = lane[0]
            say(f"part {number} begins: {TITLES[number - 1]}", start)
            with open(OUT / f"part{number}.txt", "wb") as log:
                running[number] = subprocess.Popen([sys.executable, "-m", "demo", str(number)], stdout=log)
        for number, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[number]
            for lane in queue:
                if number in lane:
                    lane.remove(number)
            queue = [lane for lane in queue if lane]
            finished.add(number)
            say(f"part {number} done", start)
            if process.returncode:
                failed.append(number)
        while printed + 1 in finished:
            printed += 1
            print(f"\n== {printed}. {TITLES[printed - 1]}\n", flush=True)
            print((OUT / f"part{printed}.txt").read_text(), flush=True)
        time.sleep(0.2)
    say(f"demo done; files, plots and pictures are in {OUT}/", start)
    for number in failed:
        print(f"part {number} failed", file=sys.stderr)
    return 1 if failed else 0


def say(text: str, start: float) -> None:
    """A line of progress on standard error."""
    print(f"[{time.time() - start:5.0f} s] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
