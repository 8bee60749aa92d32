"""What the commands of `jaxserve.cli` do; each module is imported when its command runs."""
