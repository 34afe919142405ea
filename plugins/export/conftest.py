"""What the tests of the exporters share: a small Llama with a tokenizer, and its compressed forms."""

from pathlib import Path

import pytest

TEXT = "def twice(x):\n    return 2 * x  # 1234 times, said the king's men; they'd know\n\n\tnaïve Ümläut – 東京 🙂" * 4


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """A function that writes a small network of transformers with a byte-level BPE tokenizer into a new folder."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    torch.set_num_threads(1)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<|end|>", "<|start|>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip

    def make(architecture="Llama", pre_tokenizer=None, **changes) -> Path:
        folder = tmp_path_factory.mktemp("network")
        torch.manual_seed(0)
        shape = {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 320, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 0, **changes,
        }  # fmt: skip
        config = getattr(transformers, f"{architecture}Config")(**shape)
        getattr(transformers, f"{architecture}{'LMHeadModel' if architecture == 'GPT2' else 'ForCausalLM'}")(
            config
        ).save_pretrained(folder)
        own = Tokenizer.from_str(bpe.to_str())
        if pre_tokenizer is not None:
            own.pre_tokenizer = pre_tokenizer
        transformers.PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<|start|>", eos_token="<|end|>").save_pretrained(
            folder
        )
        return folder

    return make


@pytest.fixture(scope="session")
def llama(build):
    return build()


@pytest.fixture(scope="session")
def packed(llama, tmp_path_factory):
    """A function that compresses a network (default: the small Llama) into a .tsr file, once for each method."""
    import torch

    from tersor.model import compress_model

    torch.manual_seed(1)
    windows = [torch.randint(0, 300, (1, 32)) for _ in range(4)]
    done = {}

    def pack(method, source=None, recipe=None) -> Path:
        key = (method, source, str(recipe))
        if key not in done:
            out = tmp_path_factory.mktemp("packed") / "model.tsr"
            done[key] = compress_model(source or llama, method, out, recipe=recipe, calibration=windows)
        return done[key]

    return pack


@pytest.fixture(scope="session")
def logits():
    """The logits of a network, or of a .tsr file's, on a fixed batch."""
    import torch

    from tersor.model import load_compressed

    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(2))

    def run(model):
        if isinstance(model, Path):
            model = load_compressed(model)[0]
        with torch.no_grad():
            return model(ids).logits

    return run
