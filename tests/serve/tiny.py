"""A random model whose tokens are bytes: real weights and a real engine, in no time."""

import json
from pathlib import Path

from scripts import tiny_checkpoint
from tests import fake_engine


def write(folder: Path, **changes) -> Path:
    """Writes it; changes: keys of its config.json."""
    tiny_checkpoint.write(folder, tiny_checkpoint.config("LlamaForCausalLM", **{**SIZES, **changes}))
    fake_engine.tokenizer().core.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": fake_engine.END, "chat_template": fake_engine.TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


SIZES = {"vocab_size": 258, "eos_token_id": 257, "max_position_embeddings": 4096}
