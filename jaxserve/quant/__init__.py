"""Weight formats.  A format is a pytree with `dot`; the model never asks which one it holds."""
