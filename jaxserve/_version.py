"""The version of jaxserve; the only place that says it (setup.cfg reads it from here)."""

__version__ = "0.1.0"
