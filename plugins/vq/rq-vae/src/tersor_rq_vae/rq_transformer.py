"""The RQ-Transformer: codes of a grid one after another, positions by one transformer and the depths of a position by another.

Section 3.2 of Autoregressive Image Generation using Residual Quantization (Lee et al., https://arxiv.org/abs/2203.01941).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor import ConfigError, InputError, track
from tersor_kit_vq import nearest
from tersor_rq_vae.rq_vae import RQLayer


def _blocks(width: int, heads: int, count: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, count, nn.LayerNorm(width), enable_nested_tensor=False)


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


class RQTransformer(nn.Module):
    """p(S) = prod over positions t and depths d of p(S_td | S_<t, S_t,<d) for grids of ``height`` x ``width`` positions.

    ``layer``: the trained :class:`RQLayer` whose codes are modelled; its codewords are the embeddings, by a linear map. The spatial
    transformer sees at position t the sum of the codewords of t - 1 (equation 9), the depth transformer at depth d the spatial
    context and the partial sums of the codewords before d (equations 11 and 12).
    """

    def __init__(
        self, layer: RQLayer, height: int, width: int, channels: int = 128, heads: int = 4, spatial: int = 4, depth: int = 2
    ) -> None:  # fmt: skip
        super().__init__()
        if channels % heads:
            raise ConfigError(f"channels={channels}, heads={heads}; allowed: channels that the heads divide")
        self.words: Tensor
        self.register_buffer("words", layer.codebook.words.detach().clone())
        self.shape, self.depth = (height, width), layer.depth
        self.enter = nn.Linear(layer.dim, channels)
        self.start = nn.Parameter(torch.randn(channels) * 0.02)
        self.positions = nn.Parameter(torch.randn(height * width, channels) * 0.02)
        self.depths = nn.Parameter(torch.randn(layer.depth, channels) * 0.02)
        self.spatial, self.deep = _blocks(channels, heads, spatial), _blocks(channels, heads, depth)
        self.leave = nn.Linear(channels, len(self.words))
        # vectors of any scale come in at about one
        self.scale = 1 / max(float(layer.codebook.words.detach().std(correction=0)), 1e-12)

    def _context(self, partial: Tensor) -> Tensor:
        """The spatial transformer: h_t of every position, B x T x channels, from partial sums B x T x depth x dim."""
        u = self.enter(partial[:, :-1, -1] * self.scale)
        u = torch.cat([self.start.expand(len(u), 1, -1), u], 1) + self.positions[: partial.shape[1]]
        return self.spatial(u, mask=_causal(u.shape[1], u.device), is_causal=True)  # type: ignore[no-any-return]

    def _scores(self, context: Tensor, partial: Tensor) -> Tensor:
        """The depth transformer: logits n x depths x K from contexts n x channels and the partial sums before, n x (depths - 1) x dim."""
        v = torch.cat([context[:, None], self.enter(partial * self.scale)], 1) + self.depths[: partial.shape[1] + 1]
        return self.leave(self.deep(v, mask=_causal(v.shape[1], v.device), is_causal=True))  # type: ignore[no-any-return]

    def _sums(self, codes: Tensor) -> Tensor:
        return self.words[codes].cumsum(-2)

    def forward(self, codes: Tensor) -> Tensor:
        """Logits B x T x depth x K of codes int64 B x T x depth, each seeing only what is before it."""
        partial = self._sums(codes)
        context = self._context(partial)
        return self._scores(context.flatten(0, 1), partial[:, :, :-1].flatten(0, 1)).view(*codes.shape, -1)

    def _grid(self, codes: Tensor) -> Tensor:
        wanted = (*self.shape, self.depth)
        if codes.ndim != 4 or tuple(codes.shape[1:]) != wanted:
            raise InputError(
                f"the RQ-Transformer takes codes B x {' x '.join(map(str, wanted))}; given: shape {tuple(codes.shape)}"
            )
        return codes.flatten(1, 2)

    @torch.no_grad()
    def bits(self, codes: Tensor) -> float:
        """Bits a vector that the codes (int64 B x height x width x depth) have by this prior. Raises :class:`tersor.InputError`."""
        self.eval()
        flat = self._grid(codes)
        total = sum(
            float(functional.cross_entropy(self(part).flatten(0, 2), part.reshape(-1), reduction="sum"))
            for part in flat.split(64)
        )
        return total / math.log(2) / max(1, flat.shape[0] * flat.shape[1])

    @torch.no_grad()
    def soft_codes(self, vectors: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Stochastic sampling and soft labels (section 3.2.3): codes n x depth drawn depth by depth from Q(k) ~ exp(-|r - e_k|^2 / temperature),
        and the Q they were drawn from, n x depth x K. ``vectors``: n x dim. A temperature of 0 gives the nearest codes."""
        left, codes, soft = vectors, [], []
        for _ in range(self.depth):
            if temperature > 0:
                distance = torch.addmm(self.words.square().sum(1), left, self.words.T, alpha=-2)
                q = torch.softmax(-distance / temperature, 1)
                codes.append(torch.multinomial(q, 1)[:, 0])
            else:
                codes.append(nearest(left, self.words))
                q = functional.one_hot(codes[-1], len(self.words)).float()
            soft.append(q)
            left = left - self.words[codes[-1]]
        return torch.stack(codes, 1), torch.stack(soft, 1)

    def fit(
        self,
        vectors: Sequence[Tensor],
        steps: int = 1000,
        batch: int = 16,
        rate: float = 1e-3,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> RQTransformer:
        """Train on grids of latent vectors (float B x height x width x dim each), codes being drawn anew at every step.

        ``temperature``: of the stochastic codes and soft labels, in the unit of |z|^2; 0: hard ones. Raises :class:`tersor.InputError`."""
        every = torch.cat(list(vectors)).detach().float()
        if tuple(every.shape[1:]) != (*self.shape, self.words.shape[1]) or not len(every):
            raise InputError(
                f"fit takes vectors B x {self.shape[0]} x {self.shape[1]} x {self.words.shape[1]}; given: {tuple(every.shape)}"
            )
        optimizer = torch.optim.AdamW(self.parameters(), rate, betas=(0.9, 0.95), weight_decay=1e-4)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            self.train()
            for step in track(range(steps), "training the RQ-Transformer"):
                for group in optimizer.param_groups:
                    group["lr"] = rate * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
                chosen = every[torch.randint(len(every), (batch,))]
                codes, soft = self.soft_codes(chosen.reshape(-1, chosen.shape[-1]), temperature)
                logits = self(codes.view(batch, -1, self.depth))
                loss = functional.cross_entropy(logits.flatten(0, 2), soft.flatten(0, 1))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(self.parameters(), 1.0)
                optimizer.step()
        return self.eval()

    @torch.no_grad()
    def sample(self, count: int, seed: int = 0, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """New grids of codes, int64 count x height x width x depth, position by position and depth by depth."""
        self.eval()
        generator = torch.Generator().manual_seed(seed)
        places = self.shape[0] * self.shape[1]
        codes = torch.zeros(count, places, self.depth, dtype=torch.int64)
        for t in range(places):
            # what is not drawn yet comes after, and is not seen
            context = self._context(self._sums(codes[:, : t + 1]))[:, t]
            for d in range(self.depth):
                scores = (
                    self._scores(context, self._sums(codes[:, t, :d]) if d else self.words[:0].expand(count, 0, -1))[:, -1]
                    / temperature
                )
                if top_k is not None and top_k < scores.shape[1]:
                    scores = scores.masked_fill(scores < scores.topk(top_k, 1).values[:, -1:], -torch.inf)
                codes[:, t, d] = torch.multinomial(torch.softmax(scores, 1), 1, generator=generator)[:, 0]
        return codes.view(count, *self.shape, self.depth)
