"""Every distribution works as a wheel, alone with core; a new author's package works in a fresh environment."""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECTS = sorted(p.parent for p in [ROOT / "core/pyproject.toml", *ROOT.glob("plugins/*/*/pyproject.toml")])
UV = Path(sys.executable).with_name("uv")
_LIBRARY = {canonicalize_name(d.metadata["Name"]): d for d in metadata.distributions(path=[sysconfig.get_path("purelib")])}


def project(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """Every distribution of the workspace as a wheel, unpacked into a folder of its own; by name."""
    built = tmp_path_factory.mktemp("wheels")
    out = {}
    for folder in PROJECTS:
        name = project(folder)["name"]
        subprocess.run([UV, "build", "--quiet", "--wheel", "--out-dir", built, folder], check=True)
        wheel = next(built.glob(f"{name.replace('-', '_')}-[0-9]*.whl"))
        target = tmp_path_factory.mktemp(name)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
        out[name] = (wheel, target)
    return out


def closure(name, own):
    """All distributions that an installation of ``name`` would bring: of the workspace, and of others."""
    ours, theirs, todo = set(), set(), [Requirement(name)]
    while todo:
        wanted = todo.pop()
        key = canonicalize_name(wanted.name)
        if key in own:
            if key in ours:
                continue
            ours.add(key)
            lines = own[key]
        else:
            if key in theirs or key not in _LIBRARY:
                continue
            theirs.add(key)
            lines = _LIBRARY[key].requires or []
        for line in lines:
            r = Requirement(line)
            if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in ("", *wanted.extras)):
                todo.append(r)
    return ours, theirs


# all tests of this file run in one worker: the wheels are built once
pytestmark = pytest.mark.xdist_group("packaging")

_OWN = {project(f)["name"]: project(f)["dependencies"] for f in PROJECTS}
_KINDS = {f"tersor.{kind}" for kind in ("codec", "quantizer", "pruner", "decoder")}
_METHODS = [(project(f)["name"], f) for f in PROJECTS if _KINDS & set(project(f).get("entry-points", {}))]

#: Reads {"site", "preload", "methods": {name: path}}; for each method a fork whose path holds the site and the method's wheels
#: checks it. Libraries are imported once, before the forks, so that hundreds of methods take seconds each and not an import.
_ALONE = """
import importlib, json, os, sys, traceback
job = json.load(sys.stdin)
sys.path.insert(0, job["site"])
for name in job["preload"]:
    importlib.import_module(name)

def check(name):
    import tersor
    rows = tersor.available()
    if [(r["name"], r["status"]) for r in rows] != [(name, "ok")]:
        return f"found are {rows}"
    from tersor.testing import check_method
    return "; ".join(f"{r.check}: {r.reason}" for r in check_method(name, max_examples=2, fresh_process=False) if not r.passed)

for name, path in job["methods"].items():
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            sys.path[:0] = path
            out = check(name)
        except BaseException:
            out = traceback.format_exc()
        with os.fdopen(write, "w") as file:
            file.write(out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        print(json.dumps([name, file.read() if os.waitpid(child, 0)[1] == 0 else "the process died"]), flush=True)
"""


@pytest.fixture(scope="session")
def alone(wheels, tmp_path_factory):
    """What is wrong with each method when its path holds its wheel, core's, its kit's and what their metadata asks for."""
    groups = {}
    for name, folder in _METHODS:
        ours, theirs = closure(name, _OWN)
        kind = next(iter(project(folder)["entry-points"]))
        method = next(iter(project(folder)["entry-points"][kind]))
        groups.setdefault(frozenset(theirs), {})[method] = [str(wheels[o][1]) for o in ours]
    out = {}
    for theirs, methods in groups.items():
        site = tmp_path_factory.mktemp("site")
        for dist in theirs:
            for top in {f.parts[0] for f in _LIBRARY[dist].files or []} - {"..", "__pycache__", "bin"}:
                source = Path(str(_LIBRARY[dist].locate_file(top)))
                if source.exists() and not (site / top).exists():
                    (site / top).symlink_to(source)
        preload = [m for m in ("numpy", "hypothesis", "torch") if m in theirs]
        job = json.dumps({"site": str(site), "preload": preload, "methods": methods})
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TERSOR_CACHE": str(site)}
        command = [sys.executable, "-I", "-S", "-c", _ALONE]
        done = subprocess.run(command, input=job, capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        out.update(json.loads(line) for line in done.stdout.splitlines())
    return out


@pytest.mark.parametrize(("name", "folder"), _METHODS, ids=[n for n, _ in _METHODS])
def test_a_wheel_works_alone_with_core(name, folder, alone):
    ours, _ = closure(name, _OWN)
    assert {o for o in ours if not o.startswith("tersor-kit-")} == {name, "tersor"}, "a method depends on core and its kit only"
    kind = next(iter(project(folder)["entry-points"]))
    assert alone[next(iter(project(folder)["entry-points"][kind]))] == ""


@pytest.mark.parametrize("folder", PROJECTS, ids=lambda f: f.name if f.name != "kit" else f"kit-{f.parent.name}")
def test_a_wheel_carries_types_metadata_and_readme(folder, wheels):
    about = project(folder)
    _, target = wheels[about["name"]]
    module = about["name"].replace("-", "_")
    assert (target / module / "py.typed").is_file()
    info = next(target.glob("*.dist-info"))
    text = (info / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in text
    assert len(text.split("\n\n", 1)[1].strip()) > 100, "the README is the description"
    if about["name"] in dict(_METHODS):
        assert about["urls"]["Paper"].startswith("https://")
        assert any(re.match(r"tersor>=\d+\.\d+,<\d", d) for d in about["dependencies"])
    assert not list(target.rglob("test_*.py"))


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


@pytest.mark.parametrize("folder", [f for f in PROJECTS if f.name != "core"], ids=lambda f: f"{f.parent.name}-{f.name}")
def test_arrows_point_one_way(folder):
    """A method imports itself, kits and core; a kit imports core; neither imports another method."""
    own = project(folder)["name"].replace("-", "_")
    declared = {canonicalize_name(Requirement(d).name).replace("-", "_") for d in project(folder)["dependencies"]}
    for path in folder.glob("src/**/*.py"):
        for name in _imports(path):
            top = name.split(".")[0]
            if top.startswith("tersor"):
                assert top in {own, "tersor"} or (top.startswith("tersor_kit_") and top in declared), f"{path} imports {name}"


def test_core_knows_no_method():
    for path in (ROOT / "core/src").glob("**/*.py"):
        assert not [n for n in _imports(path) if n.startswith("tersor_")], path


def test_new_packages_of_every_kind_install_with_pip_into_a_fresh_environment(wheels, tmp_path):
    """What `tersor new` writes installs beside core's wheel, is found, conforms, and has one test that fails until its author goes on."""
    names = {"codec": "my-codec", "quantizer": "my-quantizer", "pruner": "my-pruner", "decoder": "my-decoder"}
    for kind, name in names.items():
        subprocess.run(
            [sys.executable, "-m", "tersor", "new", name, "--kind", kind, "-o", tmp_path / name], check=True, capture_output=True
        )
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env/bin/python"
    folders = [str(tmp_path / n) for n in names.values()]
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheels["tersor"][0], "pytest", *folders]
    subprocess.run(install, check=True)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"TERSOR_CACHE": str(tmp_path / "cache")}
    for name in names.values():
        done = subprocess.run([tmp_path / "env/bin/tersor", "check", name], capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        tests = subprocess.run(
            [python, "-m", "pytest", "-q", tmp_path / name], capture_output=True, text=True, env=env, check=False
        )
        assert "1 failed, 1 passed" in tests.stdout, tests.stdout
    imported = subprocess.run(
        [python, "-c", "import tersor.testing, sys; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        env=env,
        check=True,
    )
    assert imported.stdout.strip() == "False"
