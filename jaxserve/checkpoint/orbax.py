"""Folders that `jaxserve convert` writes: the weights as the engine wants them, so that a start converts nothing.

    jaxserve.json       meta, each array's shape, dtype and part, and the size of each file under weights/
    weights/0, 1, ...   Orbax checkpoints of about PART bytes each, so that progress shows and host memory stays small
    config.json, generation_config.json, the tokenizer's files, the chat template: copies

jax and orbax are imported when arrays are saved or restored, not before.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import ml_dtypes  # noqa: F401  np.dtype("bfloat16") needs it
import numpy as np

from jaxserve._version import __version__
from jaxserve.checkpoint import SIDE_FILES, CheckpointError, missing, read_json

FORMAT = 1
PART = 1 << 29  # bytes
AGAIN = "convert the model again"


def save(params, meta: dict, folder: Path, source, progress=None) -> None:
    """Writes a pytree of jax arrays into the new `folder`; all of it appears at once, or nothing.

    meta: plain JSON that tells a reader whether the arrays suit it (dtype, tp, padded heads); the version is added.
    source: the Checkpoint that the arrays came from; its config and tokenizer go along.  `progress(done, total)` counts
    bytes.  CheckpointError when `folder` holds something already.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists already; give a new folder")
    named = _named(params)[0]
    first: dict[int, str] = {}
    arrays: dict[str, dict] = {}
    parts: list[dict] = []
    room = 0
    for name, array in named.items():
        if (same := first.setdefault(id(array), name)) != name:  # a tied head
            arrays[name] = {"same_as": same}
            continue
        if not parts or array.nbytes > room:
            parts.append({})
            room = PART
        parts[-1][name], room = array, room - array.nbytes
        arrays[name] = {"shape": array.shape, "dtype": str(array.dtype), "part": len(parts) - 1}
    total, done = sum(array.nbytes for part in parts for array in part.values()), 0
    import orbax.checkpoint as ocp

    with _beside(folder, total) as temporary:
        new = Path(temporary) / "new"
        for i, part in enumerate(parts):
            _checkpointer().save(new / "weights" / str(i), args=ocp.args.PyTreeSave(part))
            done += sum(array.nbytes for array in part.values())
            progress and progress(done, total)
        _copy_side_files(source, new)
        files = {
            str(file.relative_to(new)): file.stat().st_size for file in (new / "weights").rglob("*") if file.is_file()
        }
        manifest = {"format": FORMAT, "meta": {"jaxserve": __version__} | meta, "arrays": arrays, "files": files}
        (new / "jaxserve.json").write_text(json.dumps(manifest, indent=1), "utf-8")
        os.replace(new, folder)


def _beside(folder: Path, size: int):
    """A temporary folder where so many bytes have room; CheckpointError where they do not: Orbax, which has threads
    of its own, would tell of a full disk in a thousand lines."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < size:
            raise CheckpointError(
                f"{folder}: the weights take {size / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free there"
            )
        return tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent)
    except OSError as error:
        raise CheckpointError(f"{folder}: nothing can be written in {folder.parent} ({error.strerror})") from None


def _checkpointer():
    import orbax.checkpoint as ocp

    # compressing took twice the time to save and five times the time to load, for a fifth of the size (bfloat16, CPU)
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False, use_zarr3=True))


def _named(tree):
    """({"layers.0.mixer.qkv.weight": leaf, ...}, tree definition), in the tree's order."""
    import jax

    leaves, definition = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}, definition


def _copy_side_files(source, folder: Path) -> None:
    if source.path.is_dir():
        for pattern in SIDE_FILES:
            for file in source.path.glob(pattern):
                if not file.name.endswith(".index.json"):
                    shutil.copyfile(file, folder / file.name)
    known = {"config": source.config, "generation_config": source.generation_config}
    for name, value in (known | {"tokenizer_data": source.tokenizer_data}).items():
        if value:
            (folder / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False), "utf-8")


class OrbaxFolder:
    """A converted model: config, generation_config and tokenizer_data as in the package's docstring, meta as saved.

    `names`, `shape` and `dtype` speak of the engine's arrays ("layers.0.mixer.qkv.weight"), not of Hugging Face's.
    """

    def __init__(self, path: Path):
        """Reads no weights and imports no jax.  CheckpointError where the folder is not whole."""
        self.path = Path(path).expanduser().absolute()
        manifest = read_json(self.path / "jaxserve.json")
        if manifest.get("format") != FORMAT:
            found = manifest.get("format")
            raise CheckpointError(
                f"{self.path / 'jaxserve.json'}: format {found!r}, this version reads {FORMAT}; {AGAIN}"
            )
        try:
            self.meta = dict(manifest["meta"])
            self._same = {name: entry["same_as"] for name, entry in manifest["arrays"].items() if "same_as" in entry}
            own = {name: entry for name, entry in manifest["arrays"].items() if "same_as" not in entry}
            self._shapes = {name: tuple(entry["shape"]) for name, entry in own.items()}
            self._dtypes = {name: np.dtype(entry["dtype"]) for name, entry in own.items()}
            self._parts = {name: int(entry["part"]) for name, entry in own.items()}
            files = dict(manifest["files"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{self.path / 'jaxserve.json'}: corrupt ({error!r}); {AGAIN}") from error
        for name, size in files.items():
            file = self.path / name
            if not file.is_file() or file.stat().st_size != size:
                found = f"{file.stat().st_size} bytes instead of {size}" if file.is_file() else "the file is missing"
                raise CheckpointError(f"{file}: {found}; copy the folder again, or {AGAIN}")
        self.names = set(manifest["arrays"])
        self.config = read_json(self.path / "config.json")
        self.generation_config = read_json(self.path / "generation_config.json", {})
        self.tokenizer_data = read_json(self.path / "tokenizer_data.json", {}) or None

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[self._own(name)]

    def dtype(self, name: str) -> np.dtype:
        return self._dtypes[self._own(name)]

    def _own(self, name: str) -> str:
        if name not in self.names:
            raise missing(self.path, name, self.names)
        return self._same.get(name, name)

    def restore(self, like, progress=None):
        """The arrays on their devices.  `like`: the pytree that was saved, of jax.ShapeDtypeStructs with shardings.

        `progress(done, total)` counts bytes.  CheckpointError names the array that is missing, is too many, or differs.
        """
        self.check(like)
        wanted, definition = _named(like)
        parts: dict[int, dict] = {}
        for name, part in self._parts.items():
            parts.setdefault(part, {})[name] = wanted[name]
        size = {name: int(np.prod(self._shapes[name])) * self._dtypes[name].itemsize for name in self._parts}
        found: dict = {}
        done = 0
        for part, target in sorted(parts.items()):
            found |= self._restore_part(part, target)
            done += sum(size[name] for name in target)
            progress and progress(done, sum(size.values()))
        return definition.unflatten([found[self._own(name)] for name in wanted])

    def check(self, like) -> None:
        """CheckpointError, as `restore` raises it, where these are not the arrays of the folder; reads none."""
        wanted, _ = _named(like)
        for name, leaf in wanted.items():
            if (self.shape(name), self.dtype(name)) != (tuple(leaf.shape), np.dtype(leaf.dtype)):
                made = ", ".join(f"{key} {self.meta[key]}" for key in ("dtype", "tp", "kv_heads") if key in self.meta)
                raise CheckpointError(
                    f"{self.path}: array {name} is {self.dtype(name)}{list(self.shape(name))}, and "
                    f"{np.dtype(leaf.dtype)}{list(leaf.shape)} is needed; it was converted for {made}; {AGAIN}"
                )
        if extra := sorted(self.names - set(wanted)):
            raise CheckpointError(f"{self.path}: array {extra[0]} is not part of this model; {AGAIN}")

    def _restore_part(self, part: int, target: dict) -> dict:
        import jax
        import orbax.checkpoint as ocp

        path = self.path / "weights" / str(part)
        how = ocp.checkpoint_utils.construct_restore_args(target)
        try:
            found = _checkpointer().restore(path, args=ocp.args.PyTreeRestore(item=target, restore_args=how))
            return jax.block_until_ready(found)
        except (OSError, ValueError, KeyError) as error:
            first = next((line for line in str(error).splitlines() if line.strip()), "")[:300]
            raise CheckpointError(f"{path}: not readable, {AGAIN} ({type(error).__name__}: {first})") from error

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
