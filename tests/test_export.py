"""Exporters as plugins: lookup, the command line, what is left after an error, compressing and exporting in one step."""

import json
import os
import subprocess
import sys

import attrs
import pytest

import tersor
from tersor import registry
from tersor.api import as_method
from tersor.exporters import ExportModel, as_exporter, common_group, refuse

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(llama, tmp_path_factory):
    from tersor.model import compress_model

    return compress_model(llama, "rtn:bits=4,group_size=32,sym=true", tmp_path_factory.mktemp("tsr") / "small.tsr")


def test_exporters_are_found_and_are_no_methods(run):
    rows = tersor.available("exporter")
    assert {"compressed-tensors", "gguf"} <= {r["name"] for r in rows}
    assert {r["kind"] for r in rows} == {"exporter"}
    assert not {r["name"] for r in rows} & {r["name"] for r in tersor.available()}
    listed = json.loads(run("list", "--json")[1])
    assert {"gguf", "zstd"} <= {r["name"] for r in listed}
    assert {r["kind"] for r in json.loads(run("list", "--kind", "exporter", "--json")[1])} == {"exporter"}
    code, out, _ = run("info", "gguf")
    assert code == 0
    assert "writes a .gguf file" in out
    assert "rest (str, default refuse; 'refuse', 'dense')" in out
    assert json.loads(run("info", "compressed-tensors", "--json")[1])["writes"] == "a folder"
    assert run("doctor", "gguf")[0] == 0
    assert str(tersor.exporter("gguf", rest="dense")) == "gguf:rest=dense"
    assert as_exporter("gguf:rest=dense") == tersor.exporter("gguf", rest="dense") == as_exporter("gguf", rest="dense")
    assert tersor.exporter("gguf").origin()[0] == "tersor-gguf"


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (
            lambda: tersor.exporter("gguff"),
            tersor.UnknownMethodError,
            "no installed exporter is named 'gguff'; did you mean gguf",
        ),
        (lambda: tersor.exporter("zstd"), tersor.UnknownMethodError, "'zstd' is not an exporter but a codec: tersor.codec"),
        (lambda: as_method("gguf"), tersor.UnknownMethodError, "'gguf' is not a method but an exporter: tersor.export"),
        (lambda: tersor.codec("gguf"), tersor.UnknownMethodError, "'gguf' is not a codec but an exporter: tersor.export"),
        (lambda: tersor.exporter("gguf", rst=1), tersor.ConfigError, "gguf: unknown setting 'rst'"),
        (
            lambda: as_exporter("gguf:rest=some"),
            tersor.ConfigError,
            "gguf: rest='some' is not allowed; allowed: 'refuse', 'dense'",
        ),
        (lambda: as_exporter(3), tersor.InputError, "an exporter is needed, or a string such as 'gguf'; given: 3"),
    ],
)
def test_lookup_errors(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_the_command(run, model, tmp_path):
    out = tmp_path / "out.gguf"
    code, said, err = run("export", model, "--to", "gguf", "-o", out)
    assert (code, err) == (0, "")
    assert f"{out.stat().st_size:,} bytes (14 x Q4_0, 6 x F32)" in said
    code, _, err = run("export", model, "--to", "gguf", "-o", out)
    assert code == 2
    assert "exists; choose another output or give --force" in err
    code, said, _ = run("export", model, "--to", "gguf", "-o", out, "--force", "--json")
    row = json.loads(said)
    assert code == 0
    assert (row["output"], row["exporter"], row["bytes"]) == (str(out), "gguf", out.stat().st_size)
    assert row["tensors"]["model.layers.0.mlp.up_proj.weight"] == "Q4_0"
    code, _, err = run("export", model, "--to", "compressed-tensors")
    assert code == 2
    assert "writes a folder: -o FOLDER" in err
    code, said, _ = run("export", model, "--to", "compressed-tensors", "-o", f"{tmp_path}/folder/")
    assert code == 0
    assert (tmp_path / "folder/config.json").is_file()


@pytest.mark.parametrize(
    ("to", "name", "said"),
    [
        ("gguf", "out.bin", "gguf writes a .gguf file; given: out.bin"),
        ("gguf", "there.gguf", "is a folder; gguf writes a .gguf file"),
        ("compressed-tensors", "out.tsr", "compressed-tensors writes a folder; given: out.tsr"),
        ("compressed-tensors", "full", "exists; choose another output, or replace=True"),
        ("gguf", "old.gguf", "exists; choose another output, or replace=True"),
        ("gguf", "s3://bucket/x.gguf", "exports are written to local paths"),
    ],
)
def test_outputs_that_do_not_fit(model, to, name, said, tmp_path):
    (tmp_path / "there.gguf").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    (tmp_path / "old.gguf").write_text("mine")
    with pytest.raises(tersor.InputError, match=said):
        tersor.export(model, to, name if "://" in name else tmp_path / name)
    assert (tmp_path / "full/file").read_text() == (tmp_path / "old.gguf").read_text() == "mine"


def test_what_was_there_is_replaced_only_when_told(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    tersor.export(model, "compressed-tensors", out)  # an empty folder
    (out / "more").write_text("mine")
    done = tersor.export(model, "compressed-tensors", out, replace=True)
    assert not (out / "more").exists()
    assert done.nbytes == sum(f.stat().st_size for f in out.iterdir())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_error_leaves_nothing_and_what_was_there(model, monkeypatch, tmp_path):
    exporter = tersor.exporter("compressed-tensors")

    def fails(self, model, out):
        (out / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(exporter), "_export", fails)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(OSError, match="No space left"):
        exporter.export(model, tmp_path / "out", replace=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize(("to", "name"), [("compressed-tensors", "out"), ("gguf", "out.gguf")])
def test_compress_and_export_in_one_step(run, llama, model, to, name, tmp_path):
    code, said, err = run(
        "compress", llama, "--with", "rtn:bits=4,group_size=32,sym=true", "--to", to, "-o", tmp_path / name, "--json"
    )
    assert (code, err) == (0, "")
    assert json.loads(said)["output"] == str(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    options = {"gguf_file": name} if to == "gguf" else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path if options else tmp_path / name, dtype=torch.float32, **options
    )
    ours = tersor.model.load_compressed(model)[0]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)
    code, _, err = run("compress", llama, "--with", "rtn:bits=4", "--to", to, "-o", tmp_path / name)
    assert code == 2
    assert "exists" in err


def test_a_failing_export_keeps_the_compressed_model(llama, tmp_path):
    with pytest.raises(tersor.ExportError, match=r"it was pruned by magnitude.*; the compressed model is kept in .*out.tsr"):
        tersor.compress(llama, "magnitude:keep=0.5", tmp_path / "out", to="compressed-tensors")
    assert [p.name for p in tmp_path.iterdir()] == ["out.tsr"]
    with pytest.raises(tersor.InputError, match="`tersor export` goes on from it"):
        tersor.compress(llama, "magnitude:keep=0.5", tmp_path / "out", to="compressed-tensors")
    tersor.export(tmp_path / "out.tsr", "compressed-tensors", tmp_path / "out", rest="dense")
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["-o", "{}/folder"],
            "a model becomes one .tsr file, and {}/folder is a folder; .*--to EXPORTER (compressed-tensors, gguf",
        ),
        (["-o", "{}/new/"], "is a folder"),
        (["--to", "compressed-tensors"], "compressed-tensors writes a folder: -o FOLDER"),
        (["--to", "gguf", "-o", "{}/x.bin"], "gguf writes a .gguf file; given: x.bin"),
        (["--to", "ggfu", "-o", "{}/x.bin"], "no installed exporter is named 'ggfu'"),
    ],
)
def test_what_compress_says_of_outputs(run, llama, args, said, tmp_path):
    (tmp_path / "folder").mkdir()
    code, _, err = run("compress", llama, "--with", "rtn", *(a.format(tmp_path) for a in args))
    assert code == 2
    first, _, last = said.partition(".*")
    assert first.format(tmp_path) in err.replace("\n", " ")
    assert last in err.replace("\n", " ")


def test_files_are_not_exported(run, tmp_path):
    (tmp_path / "x.txt").write_text("x")
    code, _, err = run("compress", tmp_path / "x.txt", "--with", "zstd", "--to", "gguf", "-o", tmp_path / "x.gguf")
    assert code == 2
    assert "--to exports whole models" in err
    with pytest.raises(tersor.InputError, match="exports whole models; zstd was given one array or file"):
        tersor.compress(tmp_path / "x.txt", "zstd", tmp_path / "x.gguf", to="gguf")


def test_exports_are_made_from_whole_models(llama, tmp_path):
    tersor.codec("zstd").encode(b"x" * 100).save(tmp_path / "x.tsr")
    with pytest.raises(tersor.InputError, match="of a whole model; this one is of one array, by codec zstd"):
        tersor.export(tmp_path / "x.tsr", "gguf", tmp_path / "x.gguf")
    tersor.compress(llama / "model.safetensors", "rtn:bits=4,group_size=32", tmp_path / "bare.tsr")
    with pytest.raises(tersor.ExportError, match=r"has no config.json, .* made from a .safetensors file"):
        tersor.export(tmp_path / "bare.tsr", "gguf", tmp_path / "x.gguf")


def test_what_exporters_read(model, llama):
    read = ExportModel(model)
    assert (read.name, read.method) == ("small", "rtn:group_size=32,sym=true")
    assert read.config["architectures"] == ["LlamaForCausalLM"]
    assert read.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert read.files["config.json"] == (llama / "config.json").read_bytes()
    dense = tersor.decompress(model)
    assert len(read) == len(dense) - 1
    for t in read:
        assert t.shape == tuple(dense[t.name].shape)
        assert torch.equal(t.dense(), dense[t.name])
        levels = t.uniform()
        assert (levels is None) == t.kept == (t.payload() is None) == (t.method == "")
        assert levels is None or torch.equal(levels.dense(), dense[t.name])
        assert t.mask() is None
    assert repr(read).startswith("<ExportModel small: ")


def test_layers_that_are_kept_the_other_way_round(tmp_path):
    from tersor.model import compress_model

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    path = compress_model(tmp_path / "gpt2", "magnitude:keep=0.25", tmp_path / "m.tsr")
    dense = tersor.decompress(path)
    for t in ExportModel(path):
        assert t.shape == tuple(dense[t.name].shape)
        assert torch.equal(t.dense(), dense[t.name])
        if not t.kept:
            assert t.turned
            assert t.uniform() is None
            assert torch.equal(t.mask(), dense[t.name] != 0)


def test_refusals_are_grouped_by_reason():
    refuse("a format", {})
    with pytest.raises(tersor.ExportError, match=r"^a format cannot hold this model: a \(and 1 more\): too wide; b: too long$"):
        refuse("a format", {"a": "too wide", "b": "too long", "c": "too wide"})
    assert [common_group(128, c) for c in (576, 1536, 64, 100)] == [64, 128, 64, 100]


PLUGIN = """
from tersor import {imports}, hookimpl, method

@method
class Mine({base}):
    name = "{name}"
    suffix = "{suffix}"
    {extra}

@hookimpl
def tersor_exporter():
    return Mine
"""


def _plugin(site, name, **changes):
    given = {"imports": "Exporter", "base": "Exporter", "name": name, "suffix": ".mine", "extra": ""} | changes
    info = site / f"exp_{name}-0.1.dist-info"
    info.mkdir(parents=True)
    (site / f"exp_{name}.py").write_text(PLUGIN.format(**given))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: exp-{name}\nVersion: 0.1\nSummary: x\n")
    (info / "entry_points.txt").write_text(f"[tersor.exporter]\n{name} = exp_{name}\n")


WRITES = """
    def _export(self, model, out):
        out.write_text(model.name)
        return {t.name: "mine" for t in model}
"""


def test_an_exporter_of_another_author(model, tmp_path):
    site = tmp_path / "site"
    _plugin(site, "mine", extra=WRITES)
    _plugin(site, "lame", imports="Codec", base="Codec", extra='domains = ("bytes",)')
    _plugin(site, "odd", suffix="mine")
    env = {**os.environ, "PYTHONPATH": str(site), "TERSOR_CACHE": str(tmp_path / "cache")}

    def tersor_(*args):
        command = [sys.executable, "-m", "tersor", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False)

    done = tersor_("export", model, "--to", "mine", "-o", tmp_path / "out.mine", "--json")
    assert json.loads(done.stdout)["exporter"] == "mine", done.stderr
    assert (tmp_path / "out.mine").read_text() == "small"
    for name, said in (("lame", "not a class derived from Exporter"), ("odd", "suffix='mine'; needed")):
        done = tersor_("doctor", name, "--json")
        assert done.returncode == 1
        (row,) = json.loads(done.stdout)
        assert (row["kind"], row["status"]) == ("exporter", "broken")
        assert said in row["reason"]
    named = tersor_("export", model, "--to", "exp-mine/mine", "-o", tmp_path / "again.mine")
    assert named.returncode == 0, named.stderr


def test_exports_pass_through_the_hook(model, monkeypatch, tmp_path):
    seen = []
    plain = registry.operate

    def operate(operation, method, call):
        seen.append((operation, str(method)))
        return plain(operation, method, call)

    monkeypatch.setattr(registry, "operate", operate)
    done = tersor.export(model, "gguf", tmp_path / "x.gguf")
    assert seen[0] == ("export", "gguf")
    assert attrs.asdict(done)["path"] == tmp_path / "x.gguf"
