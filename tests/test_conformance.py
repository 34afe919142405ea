"""Every installed method conforms, and decodes in a process that knows nothing but its files."""

from pathlib import Path

import pytest

import tersor
from tersor import registry
from tersor.results import Mask
from tersor.testing import assert_conforms, checks

METHODS = [(m["kind"], m["name"]) for m in tersor.available() if m["status"] == "ok"]
_OWN = {
    n
    for n in (m for _, m in METHODS)
    for f in Path("plugins").glob(f"*/{n}/tests/test_*.py")
    if f'assert_conforms("{n}"' in f.read_text()
}


@pytest.mark.parametrize(("kind", "name"), [m for m in METHODS if m[1] not in _OWN])
def test_methods_without_a_conformance_test_of_their_own(kind, name):
    assert_conforms(registry.lookup(kind, name), fresh_process=False)


def test_all_methods_of_this_repository_are_installed_and_sound():
    folders = {p.parent.name for p in Path("plugins").glob("*/*/pyproject.toml")} - {"kit"}
    exporters = {e["name"] for e in tersor.available("exporter") if e["status"] == "ok"}
    assert folders <= {n for _, n in METHODS} | exporters


def test_every_method_decodes_the_same_in_a_fresh_process():
    """One new interpreter, with another number of threads, decodes a file of every example of every method."""
    pairs, want = [], []
    for kind, name in METHODS:
        if kind == "decoder":
            continue
        for m in registry.lookup(kind, name).examples():
            found = []
            checks._each(m, checks._Context(2, False), lambda x, m=m, found=found: found.append(checks.apply(m, x)), 2)
            for payload in found[:2]:
                pairs.append((m, payload))
                want.append(checks.digest(checks.restore(payload)) if m.bitwise else None)
    got = checks.decode_in_fresh_process(pairs, threads=2)
    assert len(got) == len(want)
    wrong = {str(m) for (m, _), g, w in zip(pairs, got, want, strict=True) if w is not None and g != w}
    assert not wrong


def test_masks_are_files_too():
    import numpy as np

    pruner = tersor.pruner("magnitude", keep=0.3)
    mask = pruner.prune(np.random.default_rng(0).standard_normal((20, 30)).astype(np.float32))
    back = tersor.decompress(mask.to_bytes())
    assert isinstance(back, Mask)
    assert np.array_equal(np.asarray(back.mask), np.asarray(mask.mask))
    assert back.nbytes == mask.nbytes == len(mask.to_bytes())
