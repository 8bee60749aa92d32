"""Checkpoints: a folder or file of weights as a flat table of named tensors, whatever its format.

`open(path)` looks at the path and returns an object with these members (imports no jax):

    path: Path
    config: dict              Hugging Face config.json (built from the metadata for GGUF)
    generation_config: dict   generation_config.json, {} without one
    tokenizer_data: dict|None what a GGUF file (or a folder with tokenizer_data.json) knows of its tokenizer; the keys
                              are in `jaxserve.checkpoint.gguf.tokenizer_data`.  None: the folder holds Hugging Face files
    names: set[str]           Hugging Face tensor names
    shape(name) -> tuple[int, ...]
    dtype(name) -> np.dtype   what `read` returns; ml_dtypes for bfloat16 and float8
    read(name, index=None) -> np.ndarray   a tuple of slices reads only those rows and columns
    close()                   also a context manager

Everything that is wrong with a checkpoint is a `CheckpointError` that names the file and the tensor.
"""


class CheckpointError(ValueError):
    """A checkpoint cannot be used.  The message names the file, the tensor where one is to blame, and what to do."""
