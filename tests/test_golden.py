"""Files of earlier releases decode to what they decoded to then."""

import json
from pathlib import Path

import numpy as np
import pytest

import tersor
from tersor.arrays import to_numpy
from tersor.domains import unwrap
from tersor.testing import checks

TABLES = sorted((Path(__file__).parent / "golden").glob("*/golden.json"))
FILES = [(table.parent, name, entry) for table in TABLES for name, entry in json.loads(table.read_text()).items()]


@pytest.mark.parametrize(("folder", "name", "entry"), FILES, ids=[f"{f.name}-{n}" for f, n, _ in FILES])
def test_a_golden_file_decodes_as_it_did(folder, name, entry):
    value = tersor.decompress(folder / name)
    if entry["digest"]:
        assert checks.digest(value) == entry["digest"]
    else:  # the method promises no more than rounding differences between machines and library versions
        want = np.load(folder / f"{name}.npy")
        np.testing.assert_allclose(to_numpy(unwrap(value)[0]), want, atol=0.02)


def test_this_release_has_golden_files():
    assert (Path(__file__).parent / "golden" / tersor.__version__ / "golden.json").is_file()
