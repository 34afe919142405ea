import pytest
import torch

import tersor
from tersor_kit_vq import contest

SMALL = contest.Protocol(dim=4, width=4, steps=3, batch=2, size=16, prior_steps=2)


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch, tmp_path):
    monkeypatch.setenv("TERSOR_CACHE", str(tmp_path))
    generator = torch.Generator().manual_seed(0)

    def pictures():
        return [torch.rand(3, 24, 32, generator=generator)], {contest.PHOTOGRAPHS: [torch.rand(3, 16, 20, generator=generator)]}

    made = pictures()
    monkeypatch.setattr(contest, "pictures", lambda: made)


def test_a_trial_is_kept_and_repeatable():
    row = contest.trial("vq-vae:codes=8,dim=4,encoder=none,prior=none", 1, SMALL)
    again = contest.trial("vq-vae:codes=8,dim=4,encoder=none,prior=none", 1, SMALL)
    assert again.pop("cached")
    assert again == row
    measured = row[contest.PHOTOGRAPHS]
    assert measured["psnr"] == pytest.approx(-10 * torch.tensor(measured["mse"]).log10().item(), abs=1e-4)
    assert 0 < measured["use"] <= 1
    assert 0 <= measured["order0"] <= 3
    assert row["bits"] == 3
    assert 0 < row["prior_bits"] < 10
    fresh = contest._trial(tersor.quantizer("vq-vae", codes=8, dim=4, encoder="none", prior="none"), 1, SMALL)
    assert fresh[contest.PHOTOGRAPHS] == measured
    assert contest._trial(tersor.quantizer("fsq", levels=(3, 3)), 1, SMALL)[contest.PHOTOGRAPHS] != measured


def test_rows_of_a_claim_have_every_seed():
    ours = contest.trials(tersor.quantizer("fsq", levels=(3, 3)), SMALL, seed=4, count=2)
    rows = list(contest.compared("less error", "mse", ours, ours, "lower"))
    assert len(rows) == 1
    assert not rows[0].holds
    assert rows[0].ours == contest.mean(ours, "mse") == pytest.approx(sum(r[contest.PHOTOGRAPHS]["mse"] for r in ours) / 2)
    assert rows[0].note.startswith("2 seeds: ")
    assert next(iter(contest.compared("used", "use", ours, 0.0, "higher", name="none"))).holds
    with pytest.raises(tersor.InputError, match="at least one seed"):
        list(contest.compared("less error", "mse", [], [], "lower"))


def test_use_and_entropy_by_hand():
    class Fixed(torch.nn.Module):
        sizes, bits = (2, 4), 3.0

        def forward(self, z):
            n = z.shape[0] * z.shape[1] * z.shape[2]
            codes = torch.stack([torch.zeros(n, dtype=torch.int64), torch.arange(n) % 2], 1).view(*z.shape[:3], 2)
            return contest.Quantized(z * 0, codes, z.new_zeros(()))

    network = contest.PatchAutoencoder(4, 4)
    out, grids = contest.judge(network, Fixed(), [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))])
    assert out["use"] == 0.5  # one of two, and two of four
    assert out["order0"] == pytest.approx(1.0)
    assert out["perplexity"] == pytest.approx(2.0)
    assert grids[0].unique().tolist() == [0, 1]
    assert out["error"] >= 1.0  # nothing of the vectors is left


def test_contestants_are_found_by_name():
    names = contest.contestants(bits=10, dim=32)
    assert "vq-vae:codes=1024,dim=32,encoder=none,prior=none" in names
    assert contest.contestants(["fsq"], 10, 32) == ["fsq"]
    assert contest.contestants(["fsq"], 9, 32) == []
    with pytest.raises(tersor.UnknownMethodError):
        contest.contestants(["nothing-like-it"])
