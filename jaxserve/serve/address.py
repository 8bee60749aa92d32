"""Where the server listens, and why it cannot; where the engine's socket lies."""

import errno
import os
import socket
import tempfile
from pathlib import Path

import click

from jaxserve.serve.options import ServerOptions

PORT = 5  # exit status


class Failed(click.ClickException):
    """The server could not be started, or not kept up: one line, and the exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.exit_code = status  # type: ignore[misc]


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address but does not listen yet.  Failed says why it cannot be had.

    While the model loads nobody else can have the port, and clients are refused rather than kept waiting.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise Failed(f"--server-name {host}: {error.strerror}", PORT) from error
    family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    for reuse in (0, 1):  # connections that have just ended hold a port only against those who do not say so
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        try:
            sock.bind(address)
            return sock
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE or reuse:
                raise Failed(_no_address(error, host, port), PORT) from error
    raise AssertionError


def _no_address(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use: stop what listens there, or give another --server-port"
    if error.errno == errno.EACCES:
        return f"port {port} is not for everybody: give a --server-port from 1024"
    return f"--server-name {host}: {error.strerror}"


def address(listening: socket.socket, options: ServerOptions) -> str:
    """Where a browser on this machine finds the server."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http{'s' * options.ssl}://{host}:{port}{options.root_path}"


def private_folder() -> Path:
    """Mode 0700, and not so long a path that a socket's cannot follow (107 bytes)."""
    usual = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="jaxserve-", dir=usual if len(os.fsencode(usual)) < 80 else "/tmp"))
