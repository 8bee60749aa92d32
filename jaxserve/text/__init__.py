"""Text to token ids and back: tokenizers, streamed text with stop strings, chat templates.  Imports no jax."""
