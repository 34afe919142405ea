"""``python -m tersor_vq_vae.train OUTPUT``: trains the shipped state, from photographs of scikit-image and scikit-learn."""

from __future__ import annotations

import argparse

import torch

import tersor
from tersor import data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, default=6000)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    tersor.quantizer("vq-vae", steps=chosen.steps).fit(list(data.pictures().values())).save(chosen.output)


if __name__ == "__main__":
    main()
