"""The application behind a socket, in this process: werkzeug's server, a thread a connection."""

import socket
import threading
from contextlib import contextmanager

from werkzeug.serving import WSGIRequestHandler, make_server

from tests.serve.local import serving


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_):
        pass


@contextmanager
def live(**settings):
    """(Server, its URL)."""
    with serving(**settings) as server:
        web = make_server("127.0.0.1", 0, server.app, threaded=True, request_handler=Quiet)
        web.daemon_threads = True
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server, f"http://127.0.0.1:{web.port}"
        finally:
            web.shutdown()
            thread.join()
            web.server_close()


def connect(url, path, body: bytes, **more) -> socket.socket:
    """A raw connection that has sent a POST."""
    host, port = url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=10)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    client.sendall(head.encode() + body)
    return client
