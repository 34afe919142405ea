"""A weight method over whole networks: calibration, recipes, dry run, resume, what comes back."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import tersor

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from tersor import model as M  # noqa: E402
from tersor.model import driver  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small Llama in a folder, its tied embedding and ragged widths included."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def windows():
    return [torch.randint(0, 97, (1, 32), generator=torch.Generator().manual_seed(i)) for i in range(6)]


def test_what_is_restored_is_what_was_quantized(llama, windows, tmp_path):
    out = tersor.compress(llama, "gptq:bits=4,group_size=16", tmp_path / "m.tsr", calibration=windows)
    told = tersor.inspect(out)
    assert told["kind"] == "model"
    names = [p["name"] for p in told["parts"]]
    assert sum(n.startswith("t:") for n in names) == 3 * 7
    assert "r:model.embed_tokens.weight" in names
    assert told["meta"]["ties"] == {"lm_head.weight": "model.embed_tokens.weight"}
    folder = tersor.decompress(out, tmp_path / "restored")
    model, tokenizer = M.load_model(folder)
    assert tokenizer is None
    memory, _ = M.load_model(llama)
    payloads = M.quantize(memory, "gptq:bits=4,group_size=16", windows)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, memory.state_dict()[name]), name
    sizes = {p["name"]: p["bytes"] for p in told["parts"]}
    assert all(sizes[f"t:{n}"] == p.nbytes for n, p in payloads.items())
    loaded, _ = M.load_compressed(out)
    ids = windows[0][0]
    assert M.perplexity(loaded, ids, 16) == M.perplexity(memory, ids, 16)
    tensors = tersor.decompress(out)
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_calibration_reaches_each_layer_as_a_forward_pass_would_show(llama, windows):
    """The Gram matrix that a layer is calibrated with is X'X of what it sees with all earlier blocks quantized."""
    seen = {}
    rtn = tersor.quantizer("rtn", bits=8, group_size=16)
    gptq = tersor.quantizer("gptq", bits=8, group_size=16)

    def spy(method, x, calibration=None):
        if calibration is not None:
            seen[calibration.layer] = calibration
        return rtn.quantize(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "apply_method", spy)
        patch.setattr(driver, "restore", lambda payload: rtn.dequantize(payload))
        model, _ = M.load_model(llama)
        M.quantize(model, gptq, windows)
    name = "model.layers.1.mlp.up_proj.weight"
    reference, _ = M.load_model(llama)
    quantized = {k: v for k, v in model.state_dict().items() if "layers.0." in k}
    reference.load_state_dict(quantized, strict=False)
    inputs = []
    handle = reference.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(lambda _, a: inputs.append(a[0]))
    with torch.no_grad():
        for w in windows:
            reference(w)
    handle.remove()
    x = torch.cat([i.reshape(-1, i.shape[-1]) for i in inputs])
    assert seen[name].count == len(x) == 6 * 32
    torch.testing.assert_close(seen[name].gram, x.T @ x, rtol=1e-4, atol=1e-4)
    assert len(seen) == 21


def test_recipe_and_dry_run(llama, tmp_path):
    recipe = [
        ["*.v_proj.weight", "rtn:bits=8"],
        ["re:layers\\.2\\.", None],
        ["model.embed_tokens.weight", "rtn:bits=8,group_size=48"],
    ]
    rows = {r["tensor"]: r for r in M.plan_model(llama, "rtn:bits=3", recipe)}
    assert rows["model.layers.0.self_attn.v_proj.weight"]["method"] == "rtn:bits=8"
    assert rows["model.layers.2.mlp.up_proj.weight"] == {
        "tensor": "model.layers.2.mlp.up_proj.weight", "shape": [80, 48], "pattern": "re:layers\\.2\\.", "method": "kept as it is",
    }  # fmt: skip
    assert rows["model.layers.0.mlp.up_proj.weight"]["pattern"] == "(default)"
    assert rows["model.embed_tokens.weight"]["method"] == "rtn:bits=8,group_size=48"
    assert rows["model.norm.weight"]["method"] == "kept as it is"
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    out = tersor.compress(llama, "rtn:bits=3", tmp_path / "m.tsr", recipe=path)
    parts = {p["name"] for p in tersor.inspect(out)["parts"]}
    assert "t:model.embed_tokens.weight" in parts
    assert "r:model.layers.2.mlp.up_proj.weight" in parts


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ([["*.q_porj.weight", "rtn"]], r"pattern '\*.q_porj.weight' matches no tensor; the model has 22"),
        ([["*", "rtn"], ["*.q_proj.weight", None]], "comes after others that already match all its tensors"),
        ([["re:(", "rtn"]], "is no regular expression"),
        ([["*", "png"]], "png takes image, not weights"),
        (["*"], "a recipe is a list of"),
    ],
)
def test_a_recipe_that_cannot_mean_anything_is_refused(llama, recipe, said):
    with pytest.raises(tersor.ConfigError, match=said):
        M.plan_model(llama, "rtn", recipe)


def test_missing_calibration_is_said(llama, tmp_path):
    model, _ = M.load_model(llama)
    with pytest.raises(tersor.CalibrationError, match="gptq needs calibration data, and none was given"):
        M.quantize(model, "gptq")
    with pytest.raises(tersor.CalibrationError, match="comes without a tokenizer"):
        tersor.compress(llama, "gptq", tmp_path / "m.tsr", calibration="some text")
    assert not (tmp_path / "m.tsr").exists()


def test_a_convolutional_network_is_one_block():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5)
    ).eval()
    x = [torch.randn(4, 3, 6, 6) for _ in range(4)]
    want = torch.cat([net(b) for b in x])
    payloads = M.quantize(net, "gptq:bits=8,group_size=9", x)
    assert set(payloads) == {"0.weight", "3.weight"}
    got = torch.cat([net(b) for b in x])
    assert float(((got - want).norm() / want.norm()).detach()) < 0.02


def test_a_safetensors_file_streams_through(tmp_path):
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(0)
    given = {"a.weight": rng.standard_normal((8, 130)).astype(np.float32), "b": np.arange(5), "c.bias": np.ones(3, np.float32)}
    save_file(given, tmp_path / "w.safetensors")
    out = tersor.compress(tmp_path / "w.safetensors", "rtn:bits=8", tmp_path / "w.tsr")
    back = load_file(tersor.decompress(out, tmp_path / "back.safetensors"))
    assert np.array_equal(back["b"], given["b"])
    assert np.array_equal(back["c.bias"], given["c.bias"])
    assert 0 < np.abs(back["a.weight"] - given["a.weight"]).max() < 0.02
    with pytest.raises(tersor.CalibrationError, match="not a network that data can pass through"):
        tersor.compress(tmp_path / "w.safetensors", "gptq", tmp_path / "x.tsr")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(tersor.InputError, match="not a safetensors file"):
        tersor.compress(tmp_path / "bad.safetensors", "rtn", tmp_path / "x.tsr")


_KILLED = """
import sys, time, torch
import tersor
from tersor.model import driver
slow = driver.apply_method
def wait(*args):
    time.sleep(0.15)
    return slow(*args)
driver.apply_method = wait
tersor.compress(sys.argv[1], "rtn:bits=4,group_size=16", sys.argv[2])
"""


def test_a_killed_run_goes_on_where_it_stopped(llama, tmp_path, monkeypatch):
    target = tmp_path / "m.tsr"
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(llama), str(target)])
    journal = tmp_path / "m.tsr.partial"
    end = time.time() + 60
    while time.time() < end and len(list(journal.glob("*.tsr"))) < 4:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(journal.glob("*.tsr")))
    assert done >= 4
    assert not target.exists()
    calls = []
    plain = driver.apply_method
    monkeypatch.setattr(driver, "apply_method", lambda *a: calls.append(1) or plain(*a))
    tersor.compress(llama, "rtn:bits=4,group_size=16", target)
    assert len(calls) == 21 - done
    assert not journal.exists()
    fresh = tersor.compress(llama, "rtn:bits=4,group_size=16", tmp_path / "other.tsr")
    assert target.read_bytes() == fresh.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["m.tsr", "other.tsr"]


def test_other_settings_do_not_take_up_an_old_journal(llama, tmp_path, monkeypatch):
    journal = driver._Journal(tmp_path / "m.tsr", ["other"])
    (journal.folder / "stale.tsr").write_bytes(b"x")
    tersor.compress(llama, "rtn", tmp_path / "m.tsr")
    assert sorted(os.listdir(tmp_path)) == ["m.tsr"]


def test_a_file_name_in_a_model_file_cannot_leave_the_folder(llama, tmp_path):
    from tersor import container

    out = tersor.compress(llama, "rtn", tmp_path / "m.tsr")
    header, views = container.read(out)
    container.write(tmp_path / "evil.tsr", header, {**views, "f:../evil": b"x"})
    with pytest.raises(tersor.CorruptPayloadError, match="not a plain file name"):
        tersor.decompress(tmp_path / "evil.tsr", tmp_path / "restored")
    assert sorted(os.listdir(tmp_path)) == ["evil.tsr", "m.tsr"]


def test_perplexity_of_a_uniform_model_is_its_vocabulary(llama):
    model, _ = M.load_model(llama)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert M.perplexity(model, torch.arange(40) % 97, 16) == pytest.approx(97, rel=1e-5)
    with pytest.raises(tersor.InputError, match="at least two tokens"):
        M.perplexity(model, [1])
