import json
import sys

import pytest
import tokenizers
from tokenizers import processors

from jaxserve.text import source
from jaxserve.text.tokenizer import Tokenizer

CONTROL = {"special": True, "normalized": False}


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.fixture
def folder(tmp_path, smollm2):
    """A Hugging Face folder with a byte-level tokenizer.json."""
    smollm2.core.save(str(tmp_path / "tokenizer.json"))
    return write(tmp_path, tokenizer_config__json={"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}})


@pytest.fixture
def llama(tmp_path, bpe_model):
    """A folder with a SentencePiece model alone."""
    (tmp_path / "tokenizer.model").write_bytes(bpe_model)
    return tmp_path


def test_tokenizer_json(folder, smollm2):
    tokenizer = Tokenizer.load(str(folder))
    assert tokenizer.encode("The sea 🌊<|im_end|>") == smollm2.encode("The sea 🌊<|im_end|>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template) == (1, 2, None)
    assert tokenizer.named == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def test_no_transformers_and_no_jax_is_imported(folder):
    import subprocess

    code = (
        "import sys; from jaxserve.text.tokenizer import Tokenizer; from jaxserve.text.chat import ChatTemplate; "
        f"Tokenizer.load({str(folder)!r}); print([m for m in ('jax', 'transformers', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_bos_as_the_files_say(folder):
    core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert Tokenizer.load(folder).bos_ids == ()
    core.post_processor = processors.TemplateProcessing(
        single="<|im_start|> <repo_name> $A <|im_end|>",
        special_tokens=[("<|im_start|>", 1), ("<repo_name>", 3), ("<|im_end|>", 2)],
    )
    core.enable_truncation(5)
    core.enable_padding(length=9)
    core.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.bos_ids == (1, 3)
    plain = tokenizer.encode("one two three four five six seven", bos=False)
    assert len(plain) == 7 and tokenizer.encode("one two three four five six seven") == [1, 3, *plain]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for wanted, expected in ((False, ()), (True, (1,))):
        write(folder, tokenizer_config__json=settings | {"add_bos_token": wanted})
        assert Tokenizer.load(folder).bos_ids == expected


def test_ends_of_a_reply(folder):
    write(folder, config__json={"eos_token_id": 5, "bos_token_id": 1})
    assert Tokenizer.load(folder).eos_ids == {2, 5}
    write(folder, generation_config__json={"eos_token_id": [0, 7]})
    assert Tokenizer.load(folder).eos_ids == {0, 2, 7}


def test_names_from_the_other_files(folder):
    write(folder, tokenizer_config__json={}, special_tokens_map__json={"bos_token": {"content": "<repo_name>"}})
    write(folder, config__json={"eos_token_id": [2, 0], "bos_token_id": 1})
    assert Tokenizer.load(folder).named == {"bos_token": "<repo_name>", "eos_token": "<|im_end|>"}


def test_added_tokens_of_the_config(folder, smollm2):
    size = smollm2.vocab_size
    added = {"2": {"content": "<|im_end|>", **CONTROL}, str(size): {"content": "<tool>", **CONTROL}}
    write(folder, tokenizer_config__json={"added_tokens_decoder": added})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("a<tool>")[-1] == size and tokenizer.special_ids == {*range(17), size}
    added = {str(size + 3): {"content": "<tool>", **CONTROL}}
    write(folder, tokenizer_config__json={"added_tokens_decoder": added})
    with pytest.raises(ValueError, match=rf"'<tool>' should have id {size + 3}, but the vocabulary makes it {size}"):
        Tokenizer.load(folder)


def test_chat_templates(folder):
    assert Tokenizer.load(write(folder, tokenizer_config__json={"chat_template": "one"})).chat_template == "one"
    several = [{"name": "default", "template": "two"}, {"name": "tool_use", "template": "three"}]
    tokenizer = Tokenizer.load(write(folder, tokenizer_config__json={"chat_template": several}))
    assert tokenizer.templates == {"default": "two", "tool_use": "three"}
    (folder / "additional_chat_templates").mkdir()
    write(folder, chat_template__jinja="four")
    write(folder / "additional_chat_templates", rag__jinja="five")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.templates == {"default": "four", "tool_use": "three", "rag": "five"}


def test_sentencepiece_folder(llama, spm):
    tokenizer = Tokenizer.load(write(llama, config__json={"bos_token_id": 1, "eos_token_id": 2}))
    assert tokenizer.encode("the sea") == [1, *spm.encode("the sea", bos=False)]  # Llama's habit
    assert tokenizer.named == {"bos_token": "<s>", "eos_token": "</s>"}
    no_bos = write(llama, tokenizer_config__json={"bos_token": "<s>", "add_bos_token": False})
    assert Tokenizer.load(no_bos).encode("the sea") == spm.encode("the sea", bos=False)
    once = Tokenizer.load(write(llama, tokenizer_config__json={"legacy": False}))
    assert once.decode(once.encode("the</s>sea")) == "thesea" and spm.decode(spm.encode("the</s>sea")) == "the sea"
    write(llama, added_tokens__json={"<extra>": 400})
    assert Tokenizer.load(llama).encode("<extra>", bos=False) == [400]


def test_internlm2_tokens(llama, monkeypatch):
    """Its checkpoints' own code would name these; the ids are of pieces that are there but unused."""
    monkeypatch.setattr(source, "INTERNLM2_TOKENS", {398: "<|im_end|>", 399: "<|im_start|>", 92543: "<|no|>"})
    write(llama, config__json={"model_type": "internlm2", "bos_token_id": 1, "eos_token_id": 2})
    tokenizer = Tokenizer.load(llama)
    ids = tokenizer.encode("<|im_start|>user\nthe sea<|im_end|>\n")
    assert ids[:2] == [1, 399] and ids.count(398) == 1 and tokenizer.special_ids == {0, 1, 2, 398, 399}
    named = {"398": {"content": "[END]", **CONTROL}}
    write(llama, tokenizer_config__json={"added_tokens_decoder": named, "bos_token": "<s>"})
    assert Tokenizer.load(llama).encode("[END]", bos=False) == [398]
    monkeypatch.undo()
    assert [*source.INTERNLM2_TOKENS] == list(range(92538, 92544))


def test_a_checkpoint_file_has_its_tokenizer_beside_it(folder, smollm2, smollm2_data):
    class Single:
        path = folder / "model.safetensors"
        tokenizer_data = None

    Single.path.write_bytes(b"")
    assert Tokenizer.load(Single).vocab_size == smollm2.vocab_size
    write(folder, tokenizer_data__json=smollm2_data, tokenizer__json="broken")
    assert Tokenizer.load(folder).chat_template == smollm2.chat_template


def test_other_vocabularies_come_through_transformers(tmp_path, smollm2_data):
    words = {word: id for id, word in enumerate(smollm2_data["tokens"])}
    write(tmp_path, vocab__json=words, merges__txt="#version: 0.2\n" + "\n".join(smollm2_data["merges"]))
    write(tmp_path, tokenizer_config__json={"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"})
    write(tmp_path, config__json={"model_type": "gpt2"})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("The sea 🌊")) == "The sea 🌊" and tokenizer.eos_id == 2


def test_what_is_no_tokenizer(tmp_path, folder):
    with pytest.raises(ValueError, match="nowhere is no model folder"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no tokenizer\.json or tokenizer\.model"):
        Tokenizer.load(tmp_path / "empty")
    write(folder, tokenizer__json="{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(folder)
    write(folder, tokenizer_config__json="{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.load(folder)
    write(folder, tokenizer_config__json=[])
    with pytest.raises(ValueError, match=r"tokenizer_config\.json holds no JSON object"):
        Tokenizer.load(folder)
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    core.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="byte-level and SentencePiece"):
        Tokenizer.load(write(folder, tokenizer_config__json={}))


@pytest.mark.parametrize("id", ["x", -5, {"a": 1}, [2, None], True])
def test_what_is_no_token_id(folder, id):
    with pytest.raises(ValueError, match="a token id is a whole number, 0 or more, not"):
        Tokenizer.load(write(folder, config__json={"eos_token_id": id}))


def test_a_huge_file_is_not_read(folder):
    with (folder / "tokenizer.json").open("ab") as file:
        file.truncate(500 << 20)
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer: it has 500 MiB"):
        Tokenizer.load(folder)
