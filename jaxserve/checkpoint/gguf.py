"""GGUF files (llama.cpp) read as if they were Hugging Face checkpoints: its names, shapes, config and row order."""

from pathlib import Path


def tokenizer_data(path: Path) -> dict:
    """What the metadata of a GGUF file knows of the tokenizer; reads no weights (about 0.1 s).

    Plain JSON types only, so that the same dict is also written as `tokenizer_data.json` in a converted folder:

        "model": str            "gpt2" (byte-level BPE with merges) or "llama" (SentencePiece with scores, byte fallback)
        "pre": str              llama.cpp's name of the pre-tokenizer ("smollm", "llama-bpe", "qwen2", ...); "default" if none
        "tokens": list[str]     id -> text as stored: byte-level characters for "gpt2", "▁" for a space in "llama"
        "scores": list[float]   one a token for "llama", else []
        "token_types": list[int]  one a token: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte ("<0x0A>")
        "merges": list[str]     "left right", best first, for "gpt2", else []
        "bos_id", "eos_id", "unk_id", "pad_id": int | None
        "stop_ids": list[int]   ids that end a reply: eos, eot, eom, and control tokens named like an end of turn
        "add_bos", "add_eos": bool   what encoding a plain text adds (llama.cpp's default where the file is silent)
        "add_space_prefix": bool     "llama" only: a text starts as if a space stood before it
        "chat_template": str | None  jinja
    """
    raise NotImplementedError
