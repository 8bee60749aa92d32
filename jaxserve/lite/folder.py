"""Writes the Hugging Face folder of a quantized model, so that a run that is killed goes on where it was.

Beside the folder that will be, `.NAME.partial` collects one file for each finished layer; `finish` puts them together
with what was not quantized, the configs and the tokenizer, and renames.  Whoever looks at the folder sees all or
nothing, and on a CPU the same bytes whether a run was interrupted or not.  What is then still to be done with the
folder stays in `.NAME.partial` until `forget`.  Knows no quantization format.
"""

import fcntl
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxserve.checkpoint import SIDE_FILES
from jaxserve.checkpoint.safetensors import INDEX, read_tensor, save
from jaxserve.text.tokenizer import Tokenizer

SHARD = 2 << 30  # bytes of a safetensors file, which are in memory while it is written
LEFT, WINDOWS = "left.json", "windows.safetensors"  # in an unfinished run's folder
OWN = ("config.json", "generation_config.json", "tokenizer_data.json", "jaxserve.json", INDEX)  # made, not copied
READERS, PIECE = 8, 1 << 26  # threads that read tensors, and elements that are cast at once
PACKED = (".qweight", ".weight_packed")  # a map with such a tensor has no ".weight"
DTYPES = {name: np.dtype(kind) for name, kind in
          (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16), ("float32", np.float32))}  # fmt: skip


class Folder:
    """A quantized model on its way to `path`.

    source: the unquantized Checkpoint.  quantization_config: what config.json will say.  settings: what else the result
    depends on (a dict that JSON holds).  An unfinished run with other settings, or of files that have changed since, is
    thrown away (`discarded`), and done again.  left: what `finish` was told that is still to be done with the folder,
    where an earlier run came so far and no further; else None.
    """

    def __init__(self, path, source, quantization_config: dict, settings: dict | None = None):
        """ValueError where something is at `path` already, OSError where nothing can be written there."""
        self.path, self.source, self.quantization_config = (
            Path(path).expanduser().absolute(),
            source,
            quantization_config,
        )
        self.partial = partial_of(path)
        known = {"source": str(source.path), "files": stamp(source.path), "settings": settings or {}}
        known["quantization_config"] = quantization_config
        text = json.dumps(known, indent=1, sort_keys=True)
        note = self.partial / "settings.json"
        if self.partial.is_symlink():  # what it leads to is not ours to remove
            raise ValueError(f"{self.partial} is a link; remove it, or give another --work-dir")
        self.resumed, self.left = os.path.exists(note) and note.read_bytes() == text.encode(), None
        if os.path.exists(self.path) and (not self.path.is_dir() or any(self.path.iterdir())):
            if not (self.resumed and (self.partial / LEFT).exists()):
                raise ValueError(f"{self.path} exists already; give another --work-dir, or remove it first")
            self.left = json.loads((self.partial / LEFT).read_bytes())
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(path, self.partial, error) from None
        self._lock()
        found = list(self.partial.iterdir())
        self.discarded = bool(found) and not self.resumed
        for entry in found if self.discarded else ():  # the folder itself stays, and with it the lock
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        _write_text(note, text)

    def _lock(self):
        """ValueError where another run writes here; the lock ends with `close`, or with the process."""
        handle = os.open(self.partial, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            said = f"{self.path}: another run is writing it; wait for it, or give another --work-dir"
            raise ValueError(said) from None
        except OSError:  # a file system without locks
            pass

    def _layer(self, layer: int) -> Path:
        return self.partial / f"layer-{layer:05d}.safetensors"

    def done(self, layer: int) -> bool:
        """Whether an earlier run finished this layer."""
        return self._layer(layer).exists()

    def read(self, layer: int) -> dict[str, np.ndarray]:
        """What was written for a layer."""
        with opened(self._layer(layer)) as file:
            names = list(file.keys())
        return {name: read_tensor(self._layer(layer), name) for name in names}

    def write(self, layer: int, tensors: Mapping[str, np.ndarray], about: Mapping | None = None) -> None:
        """Keeps a layer's tensors, by their names in the result; a ".weight" that has a packed form is left out there.

        float32 arrays get the model's type in the end, others stay as they are.  about: for `about`.
        """
        new = self._layer(layer).with_suffix(".new")
        arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        save(arrays, new, {"about": json.dumps(about or {})})
        _sync(new)
        new.rename(self._layer(layer))

    def about(self, layer: int) -> dict:
        """What `write` was told about a layer."""
        with opened(self._layer(layer)) as file:
            return json.loads((file.metadata() or {}).get("about", "{}"))

    def finish(self, dtype: str = "float16", progress: Callable | None = None, left: Mapping | None = None):
        """Makes the folder of what was written.  dtype: of the model; left: what remains to be done with it, for JSON.

        progress(done, total) counts bytes.  Returns the path.  ValueError names a tensor that does not fit `dtype`.
        """
        new = self.partial / "result"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        self._write_tensors(new, DTYPES[dtype], progress)
        config = {key: value for key, value in self.source.config.items() if key not in ("dtype", "torch_dtype")}
        config |= {"torch_dtype": dtype, "quantization_config": self.quantization_config}
        generation = self.source.generation_config or _generation_config(self.source)
        made = {"config.json": config, "generation_config.json": generation} | _tokenizer(self.source, new)
        for name, value in made.items():
            if value:
                _write_text(new / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        if left is not None:
            _write_text(self.partial / LEFT, json.dumps(left))
        if self.path.exists():
            self.path.rmdir()  # empty
        new.chmod(0o755)
        new.rename(self.path)
        if left is None:
            self.forget()
        for file in self.partial.glob("layer-*"):
            file.unlink()
        return self.path

    def forget(self) -> None:
        """Nothing remains to be done."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _write_tensors(self, new, dtype, progress):
        """Shards of at most SHARD bytes, with an index where there are several."""
        plan = list(self._tensors(dtype))
        shards: list[list] = [[]]
        for entry in plan:
            if shards[-1] and sum(size for *_, size in shards[-1]) + entry[2] > SHARD:
                shards.append([])
            shards[-1].append(entry)
        total, done, places = sum(size for *_, size in plan), 0, {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            arrays = {}
            with ThreadPoolExecutor(READERS) as pool:
                taken = pool.map(lambda entry: np.ascontiguousarray(entry[1]()), shard)
                for (tensor, _, size), array in zip(shard, taken, strict=True):
                    arrays[tensor], places[tensor], done = array, name, done + size
                    progress and progress(done, total)
            save(arrays, new / name, {"format": "pt"})
            (new / name).chmod(0o644)  # the library lets nobody else read it
            _sync(new / name)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": places}
            _write_text(new / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _tensors(self, dtype) -> Iterable[tuple[str, Callable, int]]:
        """(name, a function that reads it, its bytes) of every tensor of the result, layer by layer, then the rest."""
        written = set()
        for file in sorted(self.partial.glob("layer-*.safetensors")):
            with opened(file) as layer:
                parts = {name: layer.get_slice(name) for name in sorted(layer.keys())}
                for name, part in parts.items():
                    written.add(name)
                    wide = part.get_dtype() == "F32"
                    size = int(np.prod(part.get_shape())) * (dtype.itemsize if wide else _bytes(part.get_dtype()))
                    yield (
                        name,
                        lambda file=file, name=name: _cast(read_tensor(file, name), dtype, name, wide_only=True),
                        size,
                    )
        for name in sorted(self.source.names):
            if name in written or any(name.removesuffix(".weight") + end in written for end in PACKED):
                continue
            size = int(np.prod(self.source.shape(name))) * dtype.itemsize
            yield name, lambda name=name: _cast(self.source.read(name), dtype, name), size


def partial_of(path) -> Path:
    """Where an unfinished run for the folder `path` keeps what it has done."""
    path = Path(path).expanduser().absolute()
    return path.parent / f".{path.name}.partial"


def kept(path) -> str:
    """What the command that makes the folder `path` would go on with, in words; "" for nothing."""
    here = partial_of(path)
    if (here / LEFT).exists() and os.path.exists(path := Path(path).expanduser()):
        return f"{path} is complete but for its report, which the same command makes"
    layers = len(list(here.glob("layer-*.safetensors")))
    if not layers and not (here / WINDOWS).exists():
        return ""
    what = f"{layers} finished layer{'s' * (layers > 1)}" if layers else "the calibration text"
    return f"kept in {here}: {what}; the same command goes on from there"


def must_be_writable(path) -> None:
    """OSError where no file can be made in a folder, which need not be there yet, and is not afterwards."""
    folder = Path(path).expanduser().absolute()
    missing = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _unwritable(path, folder, error) from None
    finally:
        for place in filter(os.path.exists, missing):
            place.rmdir()


def _unwritable(path, tried: Path, error: OSError) -> OSError:
    where = next(place for place in (tried, *tried.parents) if os.path.exists(place))
    return OSError(f"{path} cannot be written in {where} ({error.strerror})")


def opened(file: Path):
    """A safetensors file of an unfinished run; ValueError where it is damaged."""
    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); remove it, and the same command makes it again") from None


def stamp(path) -> list:
    """[name, bytes, time of the last change] of a file, or of each in a folder: what tells that one is another."""
    path = Path(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def _bytes(kind: str) -> int:
    return int("".join(filter(str.isdigit, kind.partition("_")[0]))) // 8 if kind != "BOOL" else 1


def _cast(array, dtype, name, wide_only=False):
    if array.dtype.kind in "iub" or (wide_only and array.dtype != np.float32):
        return array
    if array.dtype == dtype and dtype == np.float32 and np.isfinite(array).all():
        return array
    out = np.empty(array.shape, dtype)
    flat, to = np.ascontiguousarray(array).reshape(-1), out.reshape(-1)
    for at in range(0, flat.size, PIECE):
        to[at : at + PIECE], sound = _converted(flat[at : at + PIECE], dtype)
        if not sound:
            raise ValueError(f"tensor {name} has values that {dtype.name} does not hold; --dtype bfloat16 does")
    return out


@partial(jax.jit, static_argnames="dtype")
def _converted(array, dtype):
    """By XLA: NumPy takes tens of seconds over the embedding of an 8B."""
    out = array.astype(dtype)
    return out, jnp.isfinite(out).all()


def _generation_config(source) -> dict:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: source.config[key] for key in keys if source.config.get(key) is not None}


def _tokenizer(source, new: Path) -> dict[str, dict]:
    """Copies the tokenizer's files into `new`, or makes them; returns JSON files that are yet to be written."""
    folder = Path(source.path)
    if not source.tokenizer_data:
        for pattern in (*SIDE_FILES, "additional_chat_templates/*.jinja"):
            for file in folder.glob(pattern):
                if file.name not in OWN and not file.name.endswith(".index.json"):
                    (new / file.relative_to(folder)).parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, new / file.relative_to(folder))
        return {}
    tokenizer = Tokenizer.load(source)
    if tokenizer.bos_ids and tokenizer.named.get("bos_token"):
        from tokenizers.processors import TemplateProcessing

        bos = tokenizer.named["bos_token"]
        tokenizer.core.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_ids[0])]
        )
    tokenizer.core.save(str(new / "tokenizer.json"))
    settings: dict = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.named}
    settings |= {"add_bos_token": bool(tokenizer.bos_ids), "clean_up_tokenization_spaces": False}
    settings["model_max_length"] = source.config.get("max_position_embeddings")
    if tokenizer.chat_template:
        settings["chat_template"] = tokenizer.chat_template
    return {"tokenizer_config.json": settings}


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:  # a full disk's does not say of what
        raise OSError(f"{path} could not be written: {error.strerror}") from None
    _sync(path)


def _sync(path: Path) -> None:
    """Waits until a file's bytes are on the disk: a rename after it must not be there first."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
