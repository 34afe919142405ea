"""Lossless Acceleration for Seq2seq Generation with Aggressive Decoding (Ge, Xia, Sun, Chen, Wei; https://arxiv.org/abs/2205.10350)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np

from tersor import Decoded, Decoder, InputError, at_least, field, method, one_of

Draft = Callable[[Sequence[int], int], Sequence[int]]


@method
class AggressiveDecoding(Decoder):
    """Drafts many tokens at once, verifies all of them in one model call, and gives exactly the greedy output.

    ``form="input-guided"`` (IAD, section 2.1) for outputs that mostly copy their input. Aggressive decoding drafts the rest of
    the input; the tokens before the bifurcation, where the model first disagrees, are kept, and the model's own token after
    them. Re-decoding then goes token by token until the suffix of the output is found once, and only once, in the input: from
    there the rest of the input is drafted again.

    ``form="generalized"`` (GAD, section 2.2) for any task: a drafting model proposes a block of tokens in one step of its own,
    and the block is verified likewise.

    Options of ``decode``: ``input_tokens``, what to copy (IAD; default: the prompt); ``draft(tokens, block) -> tokens``, the
    drafting model (GAD; the paper's is non-autoregressive): given all tokens so far it gives at most ``block`` next ones.
    Source: any :class:`tersor.Source` or transformers causal language model, whose key-value cache is cropped to what was
    accepted. Raises :class:`tersor.InputError` for a missing or misbehaving draft and for tokens beyond the vocabulary.
    """

    name = "aggressive-decoding"
    exact = "greedy"
    form: str = field(
        "input-guided", one_of("input-guided", "generalized"), help="what is drafted: the input, or a model's block"
    )
    block: int = field(64, at_least(1), help="tokens drafted at once, at most")

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(block=1), cls(form="generalized", block=5)]

    def example_options(self, source: Any) -> dict[str, Any]:
        def draft(tokens: Sequence[int], block: int) -> list[int]:
            return [(tokens[-1] + i) % source.vocabulary for i in range(block)]

        return {"draft": draft} if self.form == "generalized" else {}

    def _decode(
        self, source: Any, prompt: list[int], budget: int, input_tokens: Sequence[int] | None = None, draft: Draft | None = None
    ) -> Decoded:
        if self.form == "input-guided":
            propose = _InputGuided(_checked(prompt if input_tokens is None else input_tokens, source, "input_tokens"))
        elif draft is None:
            raise InputError("aggressive-decoding: form='generalized' needs draft=, a function (tokens, block) -> tokens")
        else:
            propose = lambda out, block: _checked(draft([*prompt, *out], block), source, "draft")[:block]  # noqa: E731
        session = source.open()
        logits = session.extend(prompt, last=1)
        out = [int(np.argmax(logits[-1]))]
        steps = accepted = drafted = 0
        while len(out) < budget and out[-1] not in source.stop:
            guess = propose(out, min(self.block, budget - len(out) - 1))
            # one call verifies the whole draft: after each token, what the model itself would say next
            start = session.length
            said = np.argmax(session.extend([out[-1], *guess]), axis=1)
            wrong = np.flatnonzero(said[:-1] != np.asarray(guess, np.int64))
            kept = int(wrong[0]) if wrong.size else len(guess)  # the bifurcation
            session.rewind(start + 1 + kept)
            new = [int(t) for t in said[: kept + 1]]
            for place, token in enumerate(new):
                if token in source.stop:
                    new = new[: place + 1]
                    break
            out += new
            steps, accepted, drafted = steps + 1, accepted + min(kept, len(new)), drafted + len(guess)
        return Decoded(np.array(out[:budget]), calls=session.calls, steps=steps + 1, accepted=accepted, drafted=drafted)


class _InputGuided:
    """Drafts from the input: its beginning first, later what follows the one place where the output's suffix stands in it."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    def __call__(self, out: Sequence[int], block: int) -> list[int]:
        # a token may open the output that the input begins with as well; then the copy starts behind it
        if len(out) == 1 and self.tokens.size and out[0] == self.tokens[0]:
            return [int(t) for t in self.tokens[1 : 1 + block]]
        places = np.flatnonzero(self.tokens == out[-1])
        length = 1
        while places.size > 1 and length < len(out):
            places = places[places >= length]
            places = places[self.tokens[places - length] == out[-1 - length]]
            length += 1
        if places.size != 1:
            return []
        return [int(t) for t in self.tokens[places[0] + 1 : places[0] + 1 + block]]


def _checked(tokens: Any, source: Any, what: str) -> np.ndarray:
    array = np.asarray(tokens)
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= source.vocabulary:
        raise InputError(
            f"aggressive-decoding: {what} is a list of tokens from 0 to {source.vocabulary - 1}; given: {tokens!r:.80}"
        )
    return array.astype(np.int64)
