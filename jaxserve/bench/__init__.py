"""Load for servers: what `jaxserve bench serve` sends, how, and what it makes of the answers.  Imports no jax."""
