"""Where a model keeps its tokenizer: the files of a Hugging Face folder, or the metadata of a GGUF file."""

import json
import os
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from jaxserve.text import vocabulary

INTERNLM2_TOKENS = {  # older checkpoints name them only in code, which is not run
    92538: "<|plugin|>",
    92539: "<|interpreter|>",
    92540: "<|action_end|>",
    92541: "<|action_start|>",
    92542: "<|im_end|>",
    92543: "<|im_start|>",
}
LARGEST = 256 << 20  # bytes of tokenizer.json, which take ten times as much when they are read
OTHERS = ("vocab.*", "merges.txt", "*.model", "*.tiktoken", "*.vocab", "vocab_*.json")  # of vocabularies
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read(model) -> dict:
    """What `Tokenizer` is made of, for a model folder or an open checkpoint (`jaxserve.checkpoint`)."""
    data = getattr(model, "tokenizer_data", None)
    if data:
        return _gguf(data, model.generation_config)
    folder = Path(getattr(model, "path", model))
    if folder.is_file() and hasattr(model, "path"):
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{folder} is no model folder; a file is opened with jaxserve.checkpoint.open first")
    if (folder / "tokenizer_data.json").exists():
        return _gguf(_json(folder / "tokenizer_data.json"), _json(folder / "generation_config.json"))
    return _folder(folder)


def ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Token ids as Hugging Face configs have them: one, several or none."""
    if value is None:
        return ()
    found = tuple(value) if isinstance(value, list | tuple) else (value,)
    if wrong := [id for id in found if type(id) is not int or id < 0]:
        raise ValueError(f"a token id is a whole number, 0 or more, not {wrong[0]!r:.60}")
    return found


def _json(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def _gguf(data: dict, generation: dict) -> dict:
    names = {"bos_token": "bos_id", "eos_token": "eos_id", "unk_token": "unk_id", "pad_token": "pad_id"}
    return {
        "core": vocabulary.from_gguf(data),
        "named": {name: data["tokens"][data[key]] for name, key in names.items() if data[key] is not None},
        "bos_ids": ids(data["bos_id"]) if data["add_bos"] else (),
        "eos_ids": (*data["stop_ids"], *ids(generation.get("eos_token_id"))),
        "templates": {"default": data["chat_template"]} if data["chat_template"] else {},
    }


def _folder(folder: Path) -> dict:
    settings = _json(folder / "tokenizer_config.json")
    config = _json(folder / "config.json")
    generation = _json(folder / "generation_config.json")
    added = {int(id): _added_token(entry) for id, entry in settings.get("added_tokens_decoder", {}).items()}
    if (folder / "tokenizer.json").exists():
        core = _from_tokenizer_json(folder / "tokenizer.json")
        vocabulary.add(core, added)
    elif (folder / "tokenizer.model").exists():
        core = _from_tokenizer_model(folder, settings, config, added)
        settings.setdefault("add_bos_token", True)  # as Llama's and InternLM2's tokenizers do
    else:
        core = _from_transformers(folder)
    named = _named(folder, settings)
    for name in ("bos", "eos"):
        for id in ids(config.get(f"{name}_token_id"))[:1]:
            if (token := core.id_to_token(id)) is not None:
                named.setdefault(f"{name}_token", token)
    ends = generation.get("eos_token_id")
    return {
        "core": core,
        "named": named,
        "bos_ids": _bos_ids(core, settings.get("add_bos_token"), named),
        "eos_ids": ids(config.get("eos_token_id") if ends is None else ends),
        "templates": _templates(folder, settings),
    }


def _from_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{path} is no tokenizer: it has {size >> 20} MiB, and none has more than {LARGEST >> 20}")
    try:
        core = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer: {error}") from None
    core.no_truncation()  # what training left there would shorten prompts
    core.no_padding()
    return core


def _from_tokenizer_model(folder: Path, settings: dict, config: dict, added: dict) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.model"
    model = vocabulary.read_sentencepiece(path.read_bytes(), str(path))
    for text, id in _json(folder / "added_tokens.json").items():
        added.setdefault(id, AddedToken(text, special=False))
    if config.get("model_type") == "internlm2":
        for id, text in INTERNLM2_TOKENS.items():
            if id < len(model.pieces):
                added.setdefault(id, AddedToken(text, special=True))
    added = {id: _unnormalized(token) for id, token in added.items()}
    return vocabulary.from_sentencepiece(model, added, prefix_once=settings.get("legacy") is False)


def _from_transformers(folder: Path) -> tokenizers.Tokenizer:
    """For vocabularies in other files (vocab.json, merges.txt): transformers knows how each family splits words."""
    if not any(file for pattern in OTHERS for file in folder.glob(pattern)):
        raise ValueError(f"{folder} has no tokenizer.json or tokenizer.model, nor other vocabularies; get it again")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is not here
    try:
        from transformers import AutoTokenizer  # slow to import

        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True).backend_tokenizer
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" :")
        raise ValueError(
            f"{folder} has no tokenizer.json or tokenizer.model, and transformers finds no tokenizer in it: {reason}"
        ) from None


def _added_token(entry: dict) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(entry["content"], **{flag: entry[flag] for flag in flags if flag in entry})


def _unnormalized(token: AddedToken) -> AddedToken:
    """The same, looked for in a text as it is written: with the space that goes before a text it would not be found."""
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        special=token.special,
        normalized=False,
    )


def _named(folder: Path, settings: dict) -> dict[str, str]:
    found = {}
    for origin in (_json(folder / "special_tokens_map.json"), settings):  # the later one wins
        for name in NAMES:
            token = origin.get(name)
            if token:
                found[name] = token["content"] if isinstance(token, dict) else token
    return found


def _bos_ids(core: tokenizers.Tokenizer, wanted: bool | None, named: dict) -> tuple[int, ...]:
    """What goes before a text: as tokenizer_config.json says, else as tokenizer.json does it."""
    if wanted is not None:
        return ids(core.token_to_id(named["bos_token"])) if wanted and "bos_token" in named else ()
    plain = core.encode("a", add_special_tokens=False).ids
    dressed = core.encode("a", add_special_tokens=True).ids
    return tuple(dressed[: next((n for n in range(len(dressed)) if dressed[n : n + len(plain)] == plain), 0)])


def _templates(folder: Path, settings: dict) -> dict[str, str]:
    """Chat templates by name; the one without a name is "default"."""
    found = settings.get("chat_template") or {}
    if isinstance(found, str):
        found = {"default": found}
    elif isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    for path in sorted(folder.glob("additional_chat_templates/*.jinja")):
        found[path.stem] = path.read_text(encoding="utf-8")
    if (path := folder / "chat_template.jinja").exists():
        found["default"] = path.read_text(encoding="utf-8")
    return found
