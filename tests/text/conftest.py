"""Two small tokenizers, one of each kind: the default model's (byte-level) and a SentencePiece one trained here."""

import io
import random

import pytest
import sentencepiece

from jaxserve import hub
from jaxserve.checkpoint import gguf
from jaxserve.text.tokenizer import Tokenizer

WORDS = "the a cat dog house sea wave sings under over blue 大海 你好 世界 naïve café Straße привет x1 x2 <tag>"


class Checkpoint:
    """As much of an open checkpoint as a tokenizer needs."""

    def __init__(self, tokenizer_data, generation_config=None):
        self.tokenizer_data = tokenizer_data
        self.generation_config = generation_config or {}


def train(kind="bpe", pieces=400, **options) -> bytes:
    """A SentencePiece model with byte fallback; only some of WORDS' characters are in it."""
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS.split(), k=8)) for _ in range(400)]
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **options}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=kind,
        vocab_size=pieces,
        byte_fallback=True,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def bpe_model():
    return train()


@pytest.fixture(scope="session")
def smollm2_data():
    try:
        return gguf.tokenizer_data(hub.default_gguf())
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(smollm2_data):
    return Tokenizer.load(Checkpoint(smollm2_data))


@pytest.fixture(scope="session")
def spm(bpe_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spm")
    (folder / "tokenizer.model").write_bytes(bpe_model)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return Tokenizer.load(folder)
