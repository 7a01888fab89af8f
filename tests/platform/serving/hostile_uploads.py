"""Invalid uploads, made from a seed; and unusual ones that are valid."""

from __future__ import annotations

import contextlib
import gzip
import io
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

MAX_BYTES, MAX_PIXELS = 20_000_000, 25_000_000  # as in serving/config.py
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Upload:
    """The bytes of one request, and whether it is valid."""

    what: str
    head: bytes  # request line and headers, without the blank line
    body: bytes
    is_good: bool = False


def uploads(number: int, seed: int = 0) -> Iterator[Upload]:
    """Yield this many uploads, of each kind in turn."""
    rng = np.random.default_rng(seed)
    kinds: list[Callable[[np.random.Generator], Upload]] = [
        _cut_jpeg, _cut_png, _bit_flips, _no_image, _other_format, _header_bomb, _pixel_bomb,
        _chunk_bomb, _scan_bomb, _too_many_bytes, _wrong_type, _broken_form, _hostile_name,
        _wrong_length, _chunked_nonsense, _packed, _nested_form, _bad_png_chunk, _odd_but_good,
        _marker_soup, _odd_mode, _bad_parameter,
    ]  # fmt: skip
    for place in range(number):
        yield kinds[place % len(kinds)](rng)


def _post(
    what: str,
    body: bytes,
    content_type: str = "application/octet-stream",
    *,
    headers: str = "",
    query: str = "",
    length: str | None = None,
    is_good: bool = False,
) -> Upload:
    length = str(len(body)) if length is None else length
    head = (
        f"POST /v1/detect{query} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: {content_type}\r\n{headers}"
    )
    if length:
        head += f"Content-Length: {length}\r\n"
    return Upload(what, head.encode("latin-1"), body, is_good)


def _image(rng: np.random.Generator, mode: str = "RGB") -> Image.Image:
    height, width = rng.integers(16, 400, 2)
    blocks = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(blocks).resize((int(width), int(height)), Image.Resampling.NEAREST)
    return image.convert(mode)


def _one_of(choices: Sequence[Any], rng: np.random.Generator) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _save(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def _jpeg(rng: np.random.Generator) -> bytes:
    return _save(_image(rng), "JPEG", progressive=bool(rng.integers(2)))


def _chunk(name: bytes, content: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(name + content) if crc is None else crc
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


def _png(width: int, height: int, rows: bytes, *, before: bytes = b"", depth: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return (
        PNG_SIGNATURE + _chunk(b"IHDR", header) + before
        + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")
    )  # fmt: skip


def _cut_jpeg(rng: np.random.Generator) -> Upload:
    content = _jpeg(rng)
    # Up to two bytes before the end, which is lost then.
    end = int(rng.integers(1, len(content) - 1))
    return _post(f"JPEG cut at {end} of {len(content)}", content[:end], "image/jpeg")


def _cut_png(rng: np.random.Generator) -> Upload:
    content = _save(_image(rng), "PNG")
    end = int(rng.integers(1, len(content) - 1))
    return _post(f"PNG cut at {end} of {len(content)}", content[:end], "image/png")


def _bit_flips(rng: np.random.Generator) -> Upload:
    """Flip bits of a PNG, where each breaks a checksum; a JPEG with flips can still decode."""
    content = bytearray(_save(_image(rng), "PNG"))
    for place in rng.integers(0, len(content) - 12, int(rng.integers(1, 30))):
        content[place] ^= 1 << int(rng.integers(8))
    content[30] ^= 0x55  # the header's checksum, should two flips have met
    return _post("PNG with flipped bits", bytes(content), "image/png")


def _no_image(rng: np.random.Generator) -> Upload:
    bodies = {
        "nothing": b"",
        "one byte": b"\xff",
        "zeros": bytes(int(rng.integers(1, 100_000))),
        "noise": rng.bytes(int(rng.integers(1, 100_000))),
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
        "HTML": b"<!DOCTYPE html><script>alert(1)</script>",
        "XML that grows": b'<!DOCTYPE a [<!ENTITY b "' + b"c" * 999 + b'">]><a>&b;&b;</a>',
        "pickle": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x06whoami\x85R.",
        "PDF": b"%PDF-1.7\n" + bytes(500),
        "script": b"#!/bin/sh\nid\n",
        "JPEG's first bytes": b"\xff\xd8\xff",
        "JPEG's first and last bytes": b"\xff\xd8\xff\xd9",
        "PNG's first bytes": PNG_SIGNATURE,
    }
    what = list(bodies)[int(rng.integers(len(bodies)))]
    return _post(what, bodies[what], "image/jpeg" if rng.integers(2) else "image/png")


def _other_format(rng: np.random.Generator) -> Upload:
    kind = ["GIF", "WEBP", "TIFF", "BMP", "ICO", "PPM", "ZIP", "GZIP"][int(rng.integers(8))]
    image = _image(rng)
    if kind == "ZIP":
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("../../evil.jpg", _jpeg(rng))
        return _post("ZIP", stream.getvalue(), "image/jpeg")
    if kind == "GZIP":
        return _post("GZIP", gzip.compress(_jpeg(rng)), "image/jpeg")
    options = (
        {"save_all": True, "append_images": [image.rotate(180)]} if kind in ("GIF", "WEBP") else {}
    )
    return _post(f"{kind} called a JPEG", _save(image, kind, **options), "image/jpeg")


def _header_bomb(rng: np.random.Generator) -> Upload:
    """A few bytes whose header declares a huge image."""
    width, height = (int(2 ** rng.uniform(13, 31)) for _ in range(2))
    if rng.integers(2):
        return _post(f"PNG header of {width} x {height}", _png(width, height, b"x"), "image/png")
    content = bytearray(_save(_image(rng), "JPEG"))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", 65_500, int(rng.integers(20_000, 65_500)))
    return _post("JPEG header of 65500 pixels", bytes(content), "image/jpeg")


def _pixel_bomb(rng: np.random.Generator) -> Upload:
    """A complete image of one colour: tiny compressed, huge decompressed."""
    width, height = 30_000, int(rng.integers(1000, 3000))
    if rng.integers(4):
        rows = zlib.compress(bytes(5000), 9)  # its header declares 30 to 90 million pixels
    else:
        packer, rows = zlib.compressobj(9), b""
        for _ in range(height):
            rows += packer.compress(bytes(width + 1))
        rows += packer.flush()
    return _post(f"PNG bomb of {width} x {height}", _png(width, height, rows), "image/png")


def _chunk_bomb(rng: np.random.Generator) -> Upload:
    """A text or colour profile that decompresses to 100 MB."""
    packed = _packed_zeros()
    name = [b"zTXt", b"iTXt", b"iCCP"][int(rng.integers(3))]
    content = {
        b"zTXt": b"Comment\0\0" + packed,
        b"iTXt": b"Comment\0\1\0\0\0" + packed,
        b"iCCP": b"ICC\0\0" + packed,
    }[name]
    # There are fewer pixels than declared, so that the image is invalid in any case.
    rows = zlib.compress(bytes(40))
    return _post(f"PNG {name!r} bomb", _png(64, 64, rows, before=_chunk(name, content)))


@cache
def _packed_zeros() -> bytes:
    return zlib.compress(bytes(100_000_000), 9)


def _scan_bomb(rng: np.random.Generator) -> Upload:
    content = _save(_image(rng), "JPEG", progressive=True)
    start = content.rindex(b"\xff\xda")
    scans = content[start:-2] * int(rng.integers(200, 3000))
    return _post("JPEG of endless scans", content[:start] + scans + b"\xff\xd9", "image/jpeg")


def _too_many_bytes(rng: np.random.Generator) -> Upload:
    content = _jpeg(rng)
    if rng.integers(2):
        return _post("20 GB declared", content, "image/jpeg", length="20000000000")
    return _post("21 MB", content + bytes(MAX_BYTES + 1_000_000 - len(content)), "image/jpeg")


def _wrong_type(rng: np.random.Generator) -> Upload:
    kinds = ["image/gif", "image/svg+xml", "application/json", "text/plain; charset=utf-7", "a/b",
             "application/x-www-form-urlencoded", "multipart/mixed; boundary=a", "*/*", "/;",
             "image/jpeg/png", "x" * 4000]  # fmt: skip
    return _post("wrong type", _jpeg(rng), _one_of(kinds, rng))


def _form(content: bytes, disposition: str, boundary: str = "a") -> bytes:
    head = f"--{boundary}\r\nContent-Disposition: {disposition}\r\n\r\n"
    return head.encode("utf-8", "surrogateescape") + content + f"\r\n--{boundary}--\r\n".encode()


def _broken_form(rng: np.random.Generator) -> Upload:
    good = _form(_jpeg(rng), 'form-data; name="image"; filename="a.jpg"')
    kind = "multipart/form-data; boundary=a"
    forms = [
        ("form without a boundary", good, "multipart/form-data"),
        ("form with an empty boundary", good, 'multipart/form-data; boundary=""'),
        ("form with another boundary", good, "multipart/form-data; boundary=b"),
        ("form without its end", good[: -int(rng.integers(6, 200))], kind),
        ("form of noise", rng.bytes(5000), kind),
        ("form with 9,000 fields", _fields(9000) + good, kind),
        ("form with a text", _form(b"x", 'form-data; name="image"'), kind),
        ("form with a long boundary", good, kind + "a" * 7000),
        ("form with endless headers", b"--a\r\n" + b"A: b\r\n" * 20_000, kind),
    ]
    return _post(*_one_of(forms, rng))


def _fields(number: int) -> bytes:
    return b"".join(
        b'--a\r\nContent-Disposition: form-data; name="f%d"\r\n\r\nv\r\n' % i for i in range(number)
    )


def _hostile_name(rng: np.random.Generator) -> Upload:
    """Hostile names in forms; no file of that name is opened, and the image is invalid anyway."""
    names = ["../../etc/passwd", "a\\0.jpg", "a\0.jpg", "C:\\con", "a" * 5000, "%00", "\u202egpj",
             "$(id)", "<script>", "\ud800"]  # fmt: skip
    name = _one_of(names, rng).encode("utf-8", "surrogatepass")
    field = b"image" if rng.integers(2) else name
    body = b'--a\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\n\r\n' % (
        field,
        name,
    )
    body += _jpeg(rng)[:200] + b"\r\n--a--\r\n"
    return _post("form with a hostile name", body, "multipart/form-data; boundary=a")


def _wrong_length(rng: np.random.Generator) -> Upload:
    content = _jpeg(rng)
    lengths = ["-1", "1e3", "0x10", "abc", "9" * 400, f"{len(content)}, 5", str(len(content) // 2)]
    length = _one_of(lengths, rng)
    return _post(f"Content-Length {length[:20]}", content, "image/jpeg", length=length)


def _chunked_nonsense(rng: np.random.Generator) -> Upload:
    bodies = [b"zz\r\nabc\r\n0\r\n\r\n", b"-5\r\nabc\r\n", b"ffffffffffffffffff\r\na\r\n",
              b"5\r\nabcdeXX0\r\n\r\n", b"3\r\nabc\r\n0\r\n\r\n"]  # fmt: skip
    body = _one_of(bodies, rng)
    return _post("chunked nonsense", body, headers="Transfer-Encoding: chunked\r\n", length="")


def _packed(rng: np.random.Generator) -> Upload:
    bomb = gzip.compress(bytes(30_000_000), 9)
    return _post("Content-Encoding gzip", bomb, "image/png", headers="Content-Encoding: gzip\r\n")


def _nested_form(rng: np.random.Generator) -> Upload:
    content = b"x"
    for depth in range(int(rng.integers(20, 300))):
        content = (
            b"--n%d\r\nContent-Type: multipart/mixed; boundary=n%d\r\n\r\n" % (depth, depth - 1)
            + content
            + b"\r\n--n%d--\r\n" % depth
        )
    body = _form(content, 'form-data; name="image"; filename="a.jpg"', "outer")
    return _post("nested forms", body, "multipart/form-data; boundary=outer")


def _bad_png_chunk(rng: np.random.Generator) -> Upload:
    rows = zlib.compress(bytes(64 * 65))
    before = [
        _chunk(b"PLTE", b"abcd"),
        _chunk(b"tEXt", b"x" * 50, crc=1),
        _chunk(b"acTL", b""),
        _chunk(b"IHDR", b"\0" * 13),
        struct.pack(">I", 0xFFFFFFFF) + b"tEXt",
        struct.pack(">I", 0x7FFFFFFF) + b"IDAT",
        _chunk(b"iCCP", b"\0" * 9, crc=7),
    ]
    which = int(rng.integers(len(before)))
    content = _png(64, 64, rows[:-9] if which in (0, 2) else rows, before=before[which])
    return _post("PNG with a bad chunk", content, "image/png")


def _marker_soup(rng: np.random.Generator) -> Upload:
    """A JPEG of markers in any order, with lengths that lead anywhere."""
    content = b"\xff\xd8\xff\xe0"
    for _ in range(int(rng.integers(1, 200))):
        content += bytes([0xFF, int(rng.integers(0xC0, 0xFF))]) + rng.bytes(int(rng.integers(40)))
    return _post("soup of JPEG markers", content, "image/jpeg")


def _odd_mode(rng: np.random.Generator) -> Upload:
    """Images that decode, in a format that is not accepted."""
    image = Image.fromarray(rng.random((30, 30)).astype(np.float32))
    return _post("float TIFF", _save(image, "TIFF"), "image/png")


def _bad_parameter(rng: np.random.Generator) -> Upload:
    queries = ["?min_score=nan", "?min_score=-1", "?max_detections=1e9", "?upright=2",
               "?max_detections=" + "9" * 5000, "?min_score=%00", "?min_score=inf"]  # fmt: skip
    return _post("bad parameter", _jpeg(rng), query=_one_of(queries, rng))


def _odd_but_good(rng: np.random.Generator) -> Upload:
    which = int(rng.integers(7))
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(1, 9))
    grey16 = Image.fromarray(rng.integers(0, 65_536, (40, 50)).astype(np.uint16))
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "<script>alert(1)</script>" * 20)
    content = [
        lambda: _save(_image(rng, "CMYK"), "JPEG"),
        lambda: _save(_image(rng), "JPEG", exif=exif),
        lambda: _save(grey16, "PNG"),
        lambda: _save(_image(rng, "L"), "JPEG"),
        lambda: _save(_image(rng, "P"), "PNG", pnginfo=text),
        lambda: _save(_image(rng, "RGBA"), "PNG"),
        lambda: _jpeg(rng) + rng.bytes(500),  # bytes after the end are ignored
    ][which]()
    query = "?upright=true" if rng.integers(2) else ""
    return _post("odd but good", content, "image/jpeg", query=query, is_good=True)


def send(upload: Upload, host: str, port: int, within_s: float = 60) -> tuple[int, bytes]:
    """Return status and body of the response; 0 if the connection ended without one."""
    with socket.create_connection((host, port), within_s) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server closed early
            connection.sendall(upload.head + b"\r\n" + upload.body)
        answer = b""
        with contextlib.suppress(ConnectionResetError, TimeoutError):
            while part := connection.recv(65_536):
                answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split(b" ")[1]) if head.startswith(b"HTTP/1.1 ") else 0), body


def peak_mib(pid: int) -> float:
    """Return the peak memory of a process since `forget_peak`."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")
