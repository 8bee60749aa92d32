import logging

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.text import vocabulary
from jaxserve.text.tokenizer import Tokenizer
from tests.text.conftest import Checkpoint, train

SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.text(max_size=30) | st.lists(
    st.sampled_from(["the", "cat", "sea", "", "大海", "naïve", "\n", "x1", "🌊"]), max_size=9
).map(" ".join)
MODELS = {
    "llama": {},
    "no prefix": {"add_dummy_prefix": False},
    "unigram": {"kind": "unigram"},
    "nfkc, spaces collapsed": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
}


@pytest.fixture(scope="module", params=MODELS, ids=list(MODELS))
def pair(request):
    """A model as sentencepiece runs it, and as it is converted."""
    data = train(**MODELS[request.param])
    return sentencepiece.SentencePieceProcessor(model_proto=data), Tokenizer(
        vocabulary.from_sentencepiece(vocabulary.read_sentencepiece(data))
    )


@SHARED
@given(text=TEXTS)
def test_sentencepiece_ids(pair, text):
    reference, tokenizer = pair
    text = text.replace("▁", "").replace("\0", "")
    ids = reference.encode(text)
    assert tokenizer.encode(text, bos=False) == ids
    assert tokenizer.decode(ids) == reference.decode(ids)


def test_reads_every_piece(bpe_model):
    reference = sentencepiece.SentencePieceProcessor(model_proto=bpe_model)
    model = vocabulary.read_sentencepiece(bpe_model)
    ids = range(reference.vocab_size())
    assert model.pieces == [reference.id_to_piece(id) for id in ids]
    assert model.scores == pytest.approx([reference.get_score(id) for id in ids])
    assert [kind == vocabulary.BYTE for kind in model.types] == [reference.is_byte(id) for id in ids]
    assert model.types[:3] == [vocabulary.UNKNOWN, vocabulary.CONTROL, vocabulary.CONTROL]


@pytest.mark.parametrize("damage", [b"", b"not a model", b"\x0a\x05ab", b"\x0b\x00", "cut"])
def test_a_damaged_model_is_named(bpe_model, damage):
    data = bpe_model[:-7] if damage == "cut" else damage
    with pytest.raises(ValueError, match=r"some/tokenizer\.model is not a SentencePiece model"):
        vocabulary.read_sentencepiece(data, "some/tokenizer.model")


@given(st.binary(max_size=60))
def test_noise_is_no_model(data):
    try:
        vocabulary.read_sentencepiece(data)
    except ValueError:
        pass


def as_gguf(data, **changes):
    """A SentencePiece model as a GGUF file has it."""
    model = vocabulary.read_sentencepiece(data)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": model.pieces,
        "scores": model.scores,
        "token_types": model.types,
        "merges": [],
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 0,
        "pad_id": None,
        "stop_ids": [2],
        "add_bos": True,
        "add_eos": False,
        "add_space_prefix": True,
        "chat_template": None,
    } | changes


def test_gguf_sentencepiece(bpe_model, spm):
    tokenizer = Tokenizer.load(Checkpoint(as_gguf(bpe_model), {"eos_token_id": [2, 3]}))
    text = "the cat 🌊 sea"
    assert tokenizer.encode(text) == [1, *spm.encode(text, bos=False)] == spm.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.eos_ids, tokenizer.special_ids) == ({2, 3}, {0, 1, 2})
    assert tokenizer.named == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    bare = Tokenizer.load(Checkpoint(as_gguf(bpe_model, add_space_prefix=False, add_bos=False)))
    assert bare.decode(bare.encode(" the cat")) == " the cat" and not bare.strips_space


def test_gguf_that_is_not_supported(bpe_model, smollm2_data):
    with pytest.raises(ValueError, match="'t5'"):
        Tokenizer.load(Checkpoint(as_gguf(bpe_model, model="t5")))
    with pytest.raises(ValueError, match=r"'seven'.*Hugging Face folder"):
        Tokenizer.load(Checkpoint(smollm2_data | {"pre": "seven"}))


@pytest.mark.parametrize(
    "pre, pieces",
    [
        ("gpt-2", ["I", "'ll", " pay", " 12345", "!?", "\n\n", " OK"]),
        ("smollm", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", "!?", "\n\n", " OK"]),
        ("llama-bpe", ["I", "'ll", " pay", " ", "123", "45", "!?\n\n", " OK"]),
        ("qwen2", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", "!?\n\n", " OK"]),
        ("tekken", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", "!?\n\n", " OK"]),
    ],
)
def test_words_are_split_as_the_pretokenizer_says(smollm2_data, pre, pieces):
    core = vocabulary.from_gguf(smollm2_data | {"pre": pre})
    text = "I'll pay 12345!?\n\n OK"
    found = [text[start:end] for _, (start, end) in core.pre_tokenizer.pre_tokenize_str(text)]
    assert found == pieces


def test_an_unnamed_pretokenizer_is_said(smollm2_data, caplog):
    with caplog.at_level(logging.WARNING):
        vocabulary.from_gguf(smollm2_data | {"pre": "default"})
    assert "does not name its pre-tokenizer" in caplog.text


def test_added_tokens_stand_over_pieces(bpe_model):
    model = vocabulary.read_sentencepiece(bpe_model)
    last = len(model.pieces)
    added = {
        last - 1: vocabulary.AddedToken("<|end|>", special=True, normalized=False),
        last: vocabulary.AddedToken("<tool>", special=False, normalized=False),
    }
    tokenizer = Tokenizer(vocabulary.from_sentencepiece(model, added))
    ids = tokenizer.encode("the<|end|>cat<tool>")
    assert ids.count(last - 1) == ids.count(last) == 1
    assert tokenizer.decode(ids) == "the cat<tool>"  # a space of its own starts the text after a special token
    assert tokenizer.special_ids == {0, 1, 2, last - 1}
    with pytest.raises(ValueError, match=rf"'<far>' has id {last + 5}; ids {last} to {last + 4} have no token"):
        vocabulary.from_sentencepiece(model, {last + 5: vocabulary.AddedToken("<far>")})


def test_prefix_once(bpe_model):
    model = vocabulary.read_sentencepiece(bpe_model)
    tokenizer = Tokenizer(vocabulary.from_sentencepiece(model, prefix_once=True))
    assert tokenizer.encode("the cat") == Tokenizer(vocabulary.from_sentencepiece(model)).encode("the cat")
    assert tokenizer.decode(tokenizer.encode("the</s>cat")) == "thecat"
