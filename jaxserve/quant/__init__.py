"""Weight formats.  A format is a pytree with `dot`; the model never asks which one it holds."""

# `quant_method` in a checkpoint's quantization_config -> the node that holds its linear maps.
FORMATS = {"awq": "int4", "gptq": "int4", "compressed-tensors": "int4"}
