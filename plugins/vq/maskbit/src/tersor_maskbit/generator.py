"""Embedding-free masked generation of bit tokens (Weber et al., https://arxiv.org/abs/2409.16211, section 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor_kit_vq import bits_to_codes, codes_to_bits


def masked_share(r: Tensor) -> Tensor:
    """Share of groups that are masked: arccos schedule, 1 at r = 0 and 0 at r = 1."""
    return torch.acos(r) / (math.pi / 2)


class BitGenerator(nn.Module):
    """A transformer that sees bits as -1 and 1, masked ones as 0, and predicts each group of a token's bits as one of 2^g classes.

    ``groups``: bits of each group, of which every one is masked by itself; ``places``: tokens of a grid, with a learned position each;
    ``classes``: labels that may condition it, as one more token (0: none). ``embedding``: learned vectors of each group's values in
    place of the bits, for comparison.
    """

    def __init__(
        self, groups: Sequence[int], places: int, width: int, depth: int, heads: int, classes: int = 0, embedding: bool = False
    ) -> None:
        super().__init__()
        self.groups, self.places, self.classes = list(groups), places, classes
        self.sizes = [1 << g for g in groups]
        self.inputs: nn.Module = (
            nn.ModuleList(nn.Embedding(n + 1, width) for n in self.sizes) if embedding else nn.Linear(sum(groups), width)
        )
        self.position = nn.Parameter(torch.zeros(places + (classes > 0), width))
        self.labels = nn.Embedding(classes + 1, width) if classes else None
        self.first = nn.Sequential(nn.LayerNorm(width), nn.Dropout(0.1))
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.1, "gelu", batch_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.last = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.head = nn.Linear(width, sum(self.sizes))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, tokens: Tensor, masked: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """Scores of each group, N x places x 2^g; ``tokens``: bool N x places x L; ``masked``: bool N x places x groups; ``labels``: int64 N,
        ``classes`` where there is none."""
        x = self._enter(tokens, masked)
        if self.labels is not None:
            known = torch.full((len(x),), self.classes, device=x.device) if labels is None else labels
            x = torch.cat([x, self.labels(known)[:, None]], 1)
        x = self.blocks(self.first(x + self.position))[:, : self.places]
        return list(self.head(self.last(x)).split(self.sizes, 2))

    def _enter(self, tokens: Tensor, masked: Tensor) -> Tensor:
        if isinstance(self.inputs, nn.ModuleList):
            values = self.values(tokens)
            index = [torch.where(masked[..., i], n, values[..., i]) for i, n in enumerate(self.sizes)]
            return torch.stack([table(i) for table, i in zip(self.inputs, index, strict=True)]).sum(0)
        spread = torch.tensor(self.groups, device=tokens.device)
        hidden = masked.repeat_interleave(spread, 2)
        return self.inputs((tokens.float() * 2 - 1).masked_fill(hidden, 0.0))  # type: ignore[no-any-return]

    def values(self, tokens: Tensor) -> Tensor:
        """The groups' values, int64 N x places x groups, of bits (bool N x places x L)."""
        return bits_to_codes(tokens.flatten(0, 1), self.groups).view(*tokens.shape[:2], len(self.groups))

    def loss(
        self, tokens: Tensor, generator: torch.Generator, smoothing: float = 0.1, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cross entropy of the masked groups in nats, summed, and their number. How many of a sample are masked is drawn by the schedule."""
        shape = (*tokens.shape[:2], len(self.groups))
        share = masked_share(torch.rand(len(tokens), 1, 1, generator=generator))
        masked = torch.rand(shape, generator=generator) < share
        wanted = self.values(tokens)
        total = self.position.new_zeros(())
        for i, scores in enumerate(self(tokens, masked, labels)):
            chosen = masked[..., i]
            total = total + functional.cross_entropy(
                scores[chosen], wanted[..., i][chosen], label_smoothing=smoothing, reduction="sum"
            )
        return total, masked.sum()

    @torch.no_grad()
    def sample(
        self, count: int, steps: int, generator: torch.Generator, labels: Tensor | None = None, guidance: float = 0.0,
        randomness: float = 7.8,
    ) -> Tensor:  # fmt: skip
        """Bits of ``count`` grids, bool count x places x L: all masked at first; each step draws every masked group and masks again the ones
        whose logarithm of probability, with Gumbel noise falling from ``randomness`` to 0, is least. ``guidance``: weight of the
        difference that the labels make."""
        groups = len(self.groups)
        tokens = torch.zeros(count, self.places, sum(self.groups), dtype=torch.bool)
        values = torch.zeros(count, self.places, groups, dtype=torch.int64)
        masked = torch.ones(count, self.places, groups, dtype=torch.bool)
        for step in range(steps):
            done = (step + 1) / steps
            scores = self(tokens, masked, labels)
            if guidance and labels is not None:
                free = self(tokens, masked)
                scores = [a + guidance * (a - b) for a, b in zip(scores, free, strict=True)]
            confidence = torch.full(masked.shape, torch.inf)
            for i, s in enumerate(scores):
                p = s.log_softmax(2)
                drawn = torch.multinomial(p.exp().flatten(0, 1), 1, generator=generator).view(count, self.places)
                open_ = masked[..., i]
                values[..., i] = torch.where(open_, drawn, values[..., i])
                sure = p.gather(2, drawn[..., None])[..., 0]
                confidence[..., i] = torch.where(open_, sure, torch.inf)
            left = int(masked[0].sum())
            again = min(max(int(masked_share(torch.tensor(done)) * self.places * groups), 1), left - 1)
            if step + 1 == steps or again < 1:
                break
            noise = -torch.empty(masked.shape).exponential_(generator=generator).log()
            ranks = (confidence + noise * (randomness * (1 - done))).flatten(1).topk(again, largest=False).indices
            masked = torch.zeros(count, self.places * groups, dtype=torch.bool).scatter_(1, ranks, True).view(masked.shape)
            tokens = self._bits(values)
        return self._bits(values)

    def _bits(self, values: Tensor) -> Tensor:
        return codes_to_bits(values.flatten(0, 1), self.groups).view(*values.shape[:2], sum(self.groups))
