import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor.testing import TableSource, assert_conforms, greedy_tokens


def test_conformance():
    assert_conforms("aggressive-decoding")


@given(st.integers(0, 10_000), st.integers(2, 6), st.lists(st.integers(0, 1), max_size=30), st.integers(1, 40), st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_any_input_to_copy_gives_the_greedy_tokens(seed, vocabulary, copied, budget, block):
    source = TableSource(vocabulary, seed, stop=[0] if seed % 3 == 0 else [])
    out = tersor.decoder("aggressive-decoding", block=block).decode(source, [1], budget, input_tokens=copied)
    assert out.tokens.tolist() == greedy_tokens(TableSource(vocabulary, seed, source.stop), [1], budget)
    assert out.calls <= len(out.tokens)


def test_a_perfect_input_takes_few_calls():
    source = TableSource(50, 3)
    want = greedy_tokens(source, [1, 2], 41)
    out = tersor.decoder("aggressive-decoding").decode(source, [1, 2], 41, input_tokens=want)
    assert out.tokens.tolist() == want
    assert out.calls == 2
    assert out.accepted == 39


def test_one_changed_token_costs_a_few_calls_not_all():
    """The copy is taken up again behind the change."""
    source = TableSource(150, 3)
    want = greedy_tokens(source, [1, 2], 60)
    changed = list(want)
    changed[30] = (changed[30] + 1) % 150
    out = tersor.decoder("aggressive-decoding").decode(source, [1, 2], 60, input_tokens=changed)
    assert out.tokens.tolist() == want
    assert out.calls <= 5


def test_a_draft_of_the_truth_is_accepted_in_blocks():
    source = TableSource(50, 3)
    want = greedy_tokens(source, [1, 2], 41)

    def draft(tokens, block):
        return want[len(tokens) - 2 :][:block]

    out = tersor.decoder("aggressive-decoding", form="generalized", block=10).decode(source, [1, 2], 41, draft=draft)
    assert out.tokens.tolist() == want
    assert out.calls == 1 + 4


def test_misuse_says_what_is_missing():
    source = TableSource(5)
    with pytest.raises(tersor.InputError, match="needs draft="):
        tersor.decoder("aggressive-decoding", form="generalized").decode(source, [1], 4)
    with pytest.raises(tersor.InputError, match="draft is a list of tokens from 0 to 4"):
        tersor.decoder("aggressive-decoding", form="generalized").decode(source, [1], 4, draft=lambda t, b: [7])
    with pytest.raises(tersor.InputError, match="input_tokens is a list of tokens"):
        tersor.decoder("aggressive-decoding").decode(source, [1], 4, input_tokens=np.array([0.5]))


def test_a_transformers_model_gives_the_greedy_tokens():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.5, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    prompt = list(range(1, 20))
    want = tersor.decoder("greedy").decode(model, prompt, 40)
    out = tersor.decoder("aggressive-decoding").decode(model, prompt, 40, input_tokens=want.tokens)
    assert np.array_equal(out.tokens, want.tokens)
    assert out.calls < want.calls
    spoilt = [int(t) if i % 7 else 3 for i, t in enumerate(want.tokens)]
    assert np.array_equal(
        tersor.decoder("aggressive-decoding").decode(model, prompt, 40, input_tokens=spoilt).tokens, want.tokens
    )
    ids = torch.tensor([prompt])
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert theirs[0, len(prompt) :].tolist() == want.tokens.tolist()
