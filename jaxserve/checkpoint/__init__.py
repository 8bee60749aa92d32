"""Checkpoints: a folder or file of weights as a flat table of named tensors, whatever its format.

`open(path)` looks at the path and returns an object with these members (no jax is imported):

    path: Path                the folder, or the GGUF file
    config: dict              Hugging Face config.json (built from the metadata for GGUF)
    generation_config: dict   generation_config.json, {} without one
    tokenizer_data: dict|None what a GGUF file (or a folder with tokenizer_data.json) knows of its tokenizer, with the
                              keys of `jaxserve.checkpoint.gguf.tokenizer_data`; None: the folder has Hugging Face files
    names: set[str]           Hugging Face tensor names
    shape(name) -> tuple[int, ...]
    dtype(name) -> np.dtype   what `read` returns; ml_dtypes for bfloat16 and float8
    read(name, index=None) -> np.ndarray   a copy; a tuple of slices reads only those rows and columns; thread-safe
    close()                   also a context manager

A folder of quantized weights (AWQ, GPTQ, compressed-tensors, fp8, smooth_quant) shows its values, and more: see
`quantized` and `eight_bit`.
A folder that `jaxserve convert` wrote has no `read`: it is an `orbax.OrbaxFolder`, with `meta` and `restore`.
Everything that is wrong with a checkpoint is a `CheckpointError` that names the file and the tensor.
"""

import difflib
import json
from pathlib import Path

SIDE_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model")  # what a model needs beside its weights; never code
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class CheckpointError(ValueError):
    """A checkpoint cannot be used.  The message names the file, the tensor where one is to blame, and what to do."""


def open(path):
    """The checkpoint at `path`: a folder with safetensors, one that `jaxserve convert` wrote, or a GGUF file."""
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path}: nothing exists here")
    if path.suffix == ".gguf":
        from jaxserve.checkpoint.gguf import GGUFFile

        return GGUFFile(path)
    if any(path.match(pattern) for pattern in PICKLES):
        raise CheckpointError(f"{path}: {PICKLED}")
    raise CheckpointError(f"{path}: a model is a GGUF file, or the folder that holds config.json and *.safetensors")


def _open_folder(path):
    if (path / "jaxserve.json").exists():
        from jaxserve.checkpoint.orbax import OrbaxFolder

        return OrbaxFolder(path)
    if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").exists():
        from jaxserve.checkpoint.quantized import unpacked
        from jaxserve.checkpoint.safetensors import SafetensorsFolder

        return unpacked(SafetensorsFolder(path))
    if ggufs := sorted(path.glob("*.gguf")):
        if len(ggufs) == 1:
            return open(ggufs[0])
        raise CheckpointError(f"{path}: holds {len(ggufs)} GGUF files; give one of them, such as {ggufs[0]}")
    for pattern in PICKLES:
        if found := sorted(path.glob(pattern)):
            raise CheckpointError(f"{found[0]}: {PICKLED}")
    raise CheckpointError(f"{path}: no weights here (looked for *.safetensors, *.gguf, jaxserve.json)")


PICKLED = (
    "pickled weights are not read, because unpickling a file runs whatever code it holds.  Take the model's "
    "safetensors version, or, if you trust the file, write one where PyTorch and transformers are installed: "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), then copy the tokenizer's files"
)


def read_json(path: Path, default: dict | None = None) -> dict:
    """A JSON object; `default` where there is no such file, CheckpointError if there is none either."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        if default is not None:
            return default
        raise CheckpointError(f"{path}: the file is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def missing(path: Path, name: str, names) -> CheckpointError:
    """The error for a tensor that is not in the checkpoint."""
    near = difflib.get_close_matches(name, names, 1)
    return CheckpointError(f"{path}: tensor {name} is missing" + (f" (there is {near[0]})" if near else ""))
