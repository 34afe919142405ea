"""Installing several hundred packages of methods from a checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.common import Report, Row, Size, say

PROJECT = """[project]
name = "tersor-dummy-{i}"
version = "0.1.0"
description = "Dummy method {i}"
requires-python = ">=3.11"
keywords = ["tersor", "family:dummy", "domain:bytes"]

[project.entry-points."tersor.codec"]
dummy-{i} = "tersor_dummy_{i}"

[build-system]
requires = ["uv_build>=0.8,<1"]
build-backend = "uv_build"
"""


def run(size: Size) -> Report:
    count = size.pick(10, 300)
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        return Report("editable packages", [Row(case="setup", measure="not installed: pip install uv", unit="")])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        listed = []
        for i in range(count):
            package = folder / f"dummy-{i}/src/tersor_dummy_{i}"
            package.mkdir(parents=True)
            (package / "__init__.py").write_text("")
            (folder / f"dummy-{i}/pyproject.toml").write_text(PROJECT.format(i=i))
            listed.append(f"-e {folder}/dummy-{i}\n")
        (folder / "workspace.txt").write_text("".join(listed))
        (folder / "first.txt").write_text(listed[0])
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder / "venv")], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", str(folder / "venv/bin/python"), "-r"]
        say("setup: one package first, so that the build backend is downloaded")
        subprocess.run([*install, str(folder / "first.txt")], check=True)
        start = time.perf_counter()
        subprocess.run([*install, str(folder / "workspace.txt")], check=True)
        seconds = time.perf_counter() - start
    row = Row(case=f"{count} packages", measure="uv pip install, editable", unit="s", ours=seconds, better="lower", aim=30)
    return Report("editable packages built with uv_build into a new environment, downloads not counted", [row])
