"""What the driver tells methods of a network, and the leaderboard of weight quantizers on a model."""

import json

import pytest

import tersor
from tersor import Calibration, Quantizer, Spec, method

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tersor import model as M  # noqa: E402
from tersor.model import board, statistics  # noqa: E402


def llama(layers: int = 2, attention: str = "sdpa"):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=2048, attn_implementation=attention, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


BATCHES = [torch.randint(0, 97, (1, 12), generator=torch.Generator().manual_seed(i)) for i in range(3)]
SEEN: dict[str, Calibration] = {}


class _Spy(Quantizer):
    """Keeps what it was calibrated with, and the weights."""

    domains = ("weight",)
    native = "torch"
    calibration = "required"

    def _quantize(self, x, calibration, spec: Spec):
        SEEN[calibration.layer] = calibration
        return {"w": x.clone()}

    def _dequantize(self, parts, spec):
        return parts["w"]


def test_gradients_are_mean_squares_of_those_of_the_loss() -> None:
    @method
    class Fisher(_Spy):
        name = "fisher-spy"
        wants = ("gradients",)

    net = llama()
    before = {n: (p.requires_grad, p.grad) for n, p in net.named_parameters()}
    M.quantize(net, Fisher(), BATCHES)
    assert {n: (p.requires_grad, p.grad) for n, p in net.named_parameters()} == before
    name = "model.layers.1.mlp.down_proj.weight"
    want = torch.zeros_like(net.get_parameter(name))
    for ids in BATCHES:
        net.zero_grad()
        net(ids, labels=ids).loss.backward()
        want += net.get_parameter(name).grad ** 2 / len(BATCHES)
    assert torch.allclose(SEEN[name].gradients, want, rtol=1e-4, atol=1e-12)
    assert SEEN[name].gram is None


def test_inputs_are_rows_that_the_layer_saw() -> None:
    @method
    class Rows(_Spy):
        name = "rows-spy"
        wants = ("gram", "inputs")

    M.quantize(llama(), Rows(), BATCHES)
    seen = SEEN["model.layers.0.mlp.gate_proj.weight"]
    assert seen.inputs.shape == (36, 32)
    assert torch.allclose(seen.inputs.T @ seen.inputs, seen.gram, rtol=1e-4)
    M.quantize(llama(), Rows(), [torch.randint(0, 97, (2, 700))] * 3)
    assert SEEN["model.layers.0.mlp.gate_proj.weight"].inputs.shape == (statistics.ROWS, 32)


def test_token_weights_come_from_causal_attention_and_multiply_the_rows() -> None:
    @method
    class Weighted(_Spy):
        name = "weighted-spy"
        wants = ("gram", "inputs")

        def token_weights(self, attention, hidden):
            assert attention.shape == (1, 4, 12, 12)
            assert float(attention.triu(1).abs().max()) == 0
            assert torch.allclose(attention.sum(-1), torch.ones(1, 4, 12), atol=1e-5)
            assert hidden.shape == (1, 12, 32)
            return attention.sum((1, 2))

    @method
    class Plain(_Spy):
        name = "plain-spy"
        wants = ("inputs",)

    net = llama(attention="sdpa")
    M.quantize(net, Weighted(), BATCHES)
    assert net.config._attn_implementation == "sdpa"
    weighted = dict(SEEN)
    M.quantize(llama(), Plain(), BATCHES)
    eager = llama(attention="eager")
    want = torch.cat([eager(ids, output_attentions=True).attentions[0].sum((1, 2)).flatten() for ids in BATCHES]).detach()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(weighted[name].inputs, SEEN[name].inputs * want[:, None], atol=1e-4)
    assert torch.allclose(weighted[name].gram, weighted[name].inputs.T @ weighted[name].inputs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scope", ["block", "network"])
def test_a_study_sees_its_scope_once_and_reaches_its_layers(scope) -> None:
    calls = []

    @method
    class Studying(_Spy):
        name = f"{scope}-spy"
        studies = scope

        def _study(self, view):
            out = view.run(0)
            calls.append(list(view.layers))
            if scope == "network":
                view.loss(0).backward()
                view.module.zero_grad()
                assert out.logits.shape == (1, 12, 97)
            else:
                assert out.shape == (1, 12, 32)
            assert torch.is_grad_enabled()
            return {name: {"told": name} for name in view.layers}

    M.quantize(llama(), Studying(), BATCHES)
    assert len(calls) == (1 if scope == "network" else 2)
    assert sum(map(len, calls)) == 14
    for name in [name for names in calls for name in names]:
        assert SEEN[name].extra["told"] == name
        assert "mean" in SEEN[name].extra


def test_a_study_of_strange_layers_and_a_loss_that_there_is_not_are_errors() -> None:
    @method
    class Strange(_Spy):
        name = "strange-spy"
        studies = "block"

        def _study(self, view):
            return {"lm_head.weight": {}}

    with pytest.raises(tersor.PluginError, match=r"lm_head\.weight"):
        M.quantize(llama(), Strange(), BATCHES)
    with pytest.raises(tersor.CalibrationError, match="gives no loss"):
        statistics.loss(torch.nn.Linear(4, 4), torch.ones(2, 4))
    with pytest.raises(tersor.CalibrationError, match="two tokens"):
        statistics.loss(llama(), torch.zeros(1, 1, dtype=torch.long))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("model")
    llama().save_pretrained(path)
    words = Tokenizer(models.WordLevel({chr(i): i - 32 for i in range(32, 127)} | {"[UNK]": 95}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(path)
    return path


def test_leaderboard_measures_keeps_and_resumes(folder, tmp_path, run, monkeypatch) -> None:
    def here(folder, name, protocol, timeout, program):
        return board.whole(folder, protocol) if name == "float32" else board.measure(folder, name, protocol)

    monkeypatch.setattr(board, "_in_process", here)  # a process for each row takes seconds; the test of errors has one
    text = tmp_path / "some.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, again and again. " * 60)
    call = [
        "bench", folder, "--kind", "quantizer", "--with", "rtn", "--with", "gptq:bits=3,group_size=16", "--bits", "4", "--bits", "2", "--samples", "2",
        "--tokens", "65", "--calibration", text, "--text", text, "--cache", tmp_path / "rows", "--json",
    ]  # fmt: skip
    rows = json.loads(run(*call)[1])
    assert [r["method"] for r in rows] == [
        "float32", "rtn", "rtn:clip=true", "rtn:bits=2", "rtn:bits=2,clip=true", "gptq:bits=3,group_size=16",
    ]  # fmt: skip
    assert all(r["perplexity"]["some.txt"] > 1 and r["tokens_per_second"] > 0 for r in rows)
    assert rows[1]["bits"] > rows[3]["bits"] > 2
    assert all(r["peak_bytes"] is None or r["peak_bytes"] >= 0 for r in rows)
    kept = sorted(p.name for p in (tmp_path / "rows").iterdir())
    assert len(kept) == 6
    again = json.loads(run(*call, "--plot", tmp_path / "rd.svg")[1])
    assert all(r.pop("cached") for r in again)
    assert again == rows
    assert (tmp_path / "rd.svg").read_text().startswith("<?xml")
    shown = run(*[c for c in call if c != "--json"])[1]
    assert "ppl some.txt" in shown
    assert "x gptq" in shown


def test_leaderboard_refuses_what_it_cannot_do(folder, run) -> None:
    code, _, err = run("bench", folder, folder, "--kind", "quantizer")
    assert code == 2
    assert "one model" in err
    code, _, err = run("bench", folder)
    assert code == 2
    assert "give a method" in err
    code, _, err = run("bench", folder, "--with", "rtn", "--bits", "4")
    assert code == 2
    assert "--bits belongs to" in err
    code, _, err = run("bench", folder, "--kind", "quantizer", "--with", "fsq", "--bits", "1")
    assert code == 2
    assert "no setting for" in err


def test_frontier_has_what_no_other_row_beats() -> None:
    rows = [
        {"bits": b, "perplexity": {"t": p}, "method": str(i)} for i, (b, p) in enumerate([(2, 9), (3, 5), (3, 7), (4, 6), (5, 4)])
    ]
    assert [r["method"] for r in board.frontier([*rows, {"error": "no", "method": "x"}], "t")] == ["0", "1", "4"]


def test_a_method_that_fails_gives_a_row_with_its_error(folder, tmp_path) -> None:
    protocol = board.Protocol(calibration="a", texts={"t": "some words"}, samples=1, window=512, tokens=9, new_tokens=2)
    found = list(board.run(folder, ["gptq"], protocol, cache=tmp_path))
    assert "CalibrationError" in found[1]["error"]
    assert len(list(tmp_path.iterdir())) == 1  # an error is not kept


def test_blocks_that_take_their_cache_by_position_see_each_input_once() -> None:
    @method
    class Rows(_Spy):
        name = "cache-spy"
        wants = ("inputs",)

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=53, n_positions=32, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=1
    )
    net = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 53, (1, 9), generator=torch.Generator().manual_seed(0))
    want = []
    net.transformer.h[2].mlp.c_fc.register_forward_pre_hook(lambda _, args: want.append(args[0][0].clone()))
    with torch.no_grad():
        net(ids)
    M.quantize(net, Rows(), [ids])  # the weights stay what they are
    assert torch.allclose(SEEN["transformer.h.2.mlp.c_fc.weight"].inputs, want[0], atol=1e-5)


def test_tokens_cannot_be_weighed_where_there_are_no_blocks() -> None:
    with pytest.raises(tersor.CalibrationError, match="repeated blocks"):
        M.quantize(llama(1), "rsq:group_size=8", BATCHES)
