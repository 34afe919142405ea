"""The quick form of the leaderboard of vector quantizers: every installed one learns something in a hundred steps."""

from __future__ import annotations

import json

import pytest

import tersor
from bench import leaderboard_vq
from tersor_kit_vq import contest


@pytest.mark.slow
def test_every_quantizer_learns_in_the_quick_leaderboard(tmp_path, monkeypatch, capsys) -> None:
    import torch

    monkeypatch.setenv("TERSOR_CACHE", str(tmp_path))
    monkeypatch.setattr(leaderboard_vq, "OUT", tmp_path / "out")
    threads = torch.get_num_threads()
    try:
        assert leaderboard_vq.main(["--quick", "--json"]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(capsys.readouterr().out)
    assert {r["method"].partition(":")[0] for r in rows} >= {"fsq", "vq-vae", "simvq", "rq-vae"}
    assert not [r for r in rows if "failed" in r]
    pictures = contest.pictures()[1][contest.PHOTOGRAPHS]
    levels = torch.cat([p.flatten(1) for p in pictures], 1)
    flat = -10 * float((levels - levels.mean(1, keepdim=True)).square().mean().log10())  # one colour for all of them
    for row in rows:
        assert row["psnr"] > flat, row["method"]
        assert 0 < row["use"] <= 1
        assert row["order0"] <= row["bits"] + 1e-6
        assert row["prior_bits"] is None
    assert not (tmp_path / "out").exists()  # the page is of whole runs only


def test_the_page_has_every_row(tmp_path) -> None:
    rows = [
        {"method": "one:codes=2", "bits": 1.0, "psnr": 20.0, "deviation": 0.1, "psnr_kodak": None, "use": 1.0, "use_taught": 1.0, "perplexity": 2.0,
         "error": 0.1, "order0": 1.0, "prior_bits": 0.5, "seconds": 1.0, "encode": 1e6, "decode": 1e7},
        {"method": "two", "failed": "InputError: not today"},
    ]  # fmt: skip
    text = leaderboard_vq.markdown(rows, "# Head\n\n")
    assert "| `one:codes=2` | 1.00 | 20.00 ± 0.10 |  | 100.0 % | 100.0 % | 2 | 0.100 | 1.00 | 0.50 | 1 | 1e+06 | 1e+07 |" in text
    assert "- `two`: InputError: not today" in text
    leaderboard_vq.plot(rows, tmp_path / "vq.svg")
    assert (tmp_path / "vq.svg").read_text().startswith("<?xml")


def test_seeds_become_one_row() -> None:
    def row(seed: int, psnr: float) -> dict:
        of = {"mse": 0.01, "psnr": psnr, "use": 0.5, "perplexity": 4.0, "order0": 2.0, "error": 0.1}
        return {
            "method": "m",
            "seed": seed,
            "bits": 3.0,
            "seconds": 2.0 + seed,
            "encode": 1.0,
            "decode": 1.0,
            "prior_bits": 1.0,
            "photographs": of,
        }

    found = leaderboard_vq.rows_of([row(0, 20.0), row(1, 22.0), {"method": "n", "error": "StateError: x"}])
    assert found[0]["psnr"] == 21.0
    assert found[0]["deviation"] == 1.0
    assert found[0]["seconds"] == 2.5
    assert found[1] == {"method": "n", "failed": "StateError: x"}
    with pytest.raises(tersor.UnknownMethodError):
        leaderboard_vq.main(["nothing-like-it"])
