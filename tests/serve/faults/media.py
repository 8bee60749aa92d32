"""Rows 36 to 39: pictures, which may point anywhere and be far larger than they look."""

import base64
import struct
import time
import zlib
from collections.abc import Iterator

from tests.serve.faults.row import Row, fault
from tests.serve.faults.target import CHAT, Reply, Target
from tests.serve.faults.texts import canary

MORE = 100 << 20  # bytes that a refused picture may cost


def shown(target: Target, url: str, **more) -> Reply:
    """Sends a picture."""
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": url}}]
    return target.chat(messages=[{"role": "user", "content": parts}], **more)


def elsewhere(target: Target) -> Iterator[str | None]:
    with canary() as (port, called):
        for url in (
            "http://169.254.169.254/latest/meta-data",
            f"http://[::ffff:127.0.0.1]:{port}/a.png",
            f"http://2130706433:{port}/a.png",
            f"http://0x7f000001:{port}/a.png",
            f"http://127.0.0.1:{port}/a.png",
            f"http://localhost:{port}/a.png",
            f"http://[64:ff9b::7f00:1]:{port}/a.png",
            f"http://a@127.0.0.1:{port}/a.png",
            f"ftp://127.0.0.1:{port}/a.png",
        ):
            yield fault(target, url, shown(target, url), 400, within=2)
        time.sleep(0.2)
        if called:
            yield f"{len(called)} connections were made to this machine"


def files(target: Target) -> Iterator[str | None]:
    for url in ("file:///etc/passwd", "file://../x", "file://localhost/etc/passwd", "/etc/passwd", "../../etc/passwd"):
        reply = shown(target, url)
        yield fault(target, url, reply, 400)
        if b"root:" in reply.data:
            yield f"{url}: the file was read"


def png(width: int, height: int) -> bytes:
    """All black, one bit a pixel: some kilobytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = bytes((width + 7) // 8 + 1) * height
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def gif(frames: int) -> bytes:
    """One pixel, so many times."""
    head = b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff"
    frame = b"!\xf9\x04\x00\x01\x00\x00\x00,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00"
    return head + frame * frames + b";"


def bombs(target: Target) -> Iterator[str | None]:
    before = target.memory() if target.memory else 0
    for name, kind, data in (
        ("9000 x 9000", "png", png(9000, 9000)),
        ("15000 x 15000", "png", png(15_000, 15_000)),
        ("10 000 frames", "gif", gif(10_000)),
        ("a cut JPEG", "jpeg", b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00\xff\xdb"),
        ("SVG", "svg+xml", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
    ):
        url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        yield fault(target, name, shown(target, url), 400)
    if target.memory and target.memory() > before + MORE:
        yield f"memory grew by {target.memory() - before >> 20} MiB"


def encodings(target: Target) -> Iterator[str | None]:
    for url in ("data:image/png;base64,####", "data:image/png;base64,", "data:,", "data:image/png;base64,iVBORw0"):
        yield fault(target, url, shown(target, url), 400)
    size = 200 << 20
    begin = b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:;base64,'
    pieces = [target.head("POST", CHAT, len(begin) + size), begin, *[b"A" * (1 << 20)] * (size >> 20)]
    yield fault(target, "200 MB", target.raw(pieces), 413, 400)


ROWS = [
    Row(36, "image_url to the link-local, loopback and disguised addresses", "400, no connection made", elsewhere),
    Row(37, "image_url file:///etc/passwd, file://../x", "400", files),
    Row(38, "PNG bombs, a cut JPEG, SVG, 10 000 frames", "400, memory +<100 MB", bombs),
    Row(39, "data: URL with bad base64, 200 MB of it", "400/413", encodings),
]
