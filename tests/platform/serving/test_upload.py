"""Uploads: which bodies are read as an image, and which are refused with which status."""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import AsyncIterator

import numpy as np
import pytest
from PIL import Image

from deta.platform.data.image_sizes import PixelRules
from deta.platform.serving.config import ServingConfig
from deta.platform.serving.upload import (
    MAX_SCANS,
    count_scans,
    decode_image,
    read_image,
)
from deta.platform.system.origin_guard import Refusal
from tests.platform.serving.serving_case import encoded, form, random_image

CONFIG = ServingConfig(max_bytes=100_000, max_pixels=1_000_000, read_timeout_s=0.3)
# The mean difference over noise, which JPEG stores badly. Two images of noise differ by 85.
JPEG_LOSS = 25


async def in_parts(*parts: bytes, pause_s: float = 0.0) -> AsyncIterator[bytes]:
    for part in parts:
        await asyncio.sleep(pause_s)
        yield part


def read(*parts: bytes, pause_s: float = 0.0, **headers: str) -> bytes:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return asyncio.run(read_image(named, in_parts(*parts, pause_s=pause_s), CONFIG))


def refusal(*parts: bytes, pause_s: float = 0.0, **headers: str) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read(*parts, pause_s=pause_s, **headers)
    return caught.value


def not_decoded(content: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        decode_image(content, CONFIG)
    return caught.value


@pytest.mark.parametrize(
    "content_type",
    ["", "image/jpeg", "IMAGE/PNG", "application/octet-stream", "image/jpeg; charset=binary"],
)
def test_a_body_of_any_of_these_types_is_the_image(content_type: str):
    headers = {"content_type": content_type} if content_type else {}
    assert read(b"ab", b"", b"c", **headers) == b"abc"


@pytest.mark.parametrize(
    "content_type", ["image/gif", "text/html", "application/json", "image/svg+xml", "nonsense"]
)
def test_another_declared_type_or_encoding_is_415(content_type: str):
    found = refusal(b"abc", content_type=content_type)
    assert (found.status_code, found.kind) == (415, "content_type")
    assert refusal(b"abc", content_encoding="gzip").status_code == 415


def test_the_file_of_a_form_is_the_image():
    body, content_type = form(b"\x00\r\n--b\xff" * 9)
    parts = [body[i : i + 7] for i in range(0, len(body), 7)]
    assert read(*parts, content_type=content_type) == b"\x00\r\n--b\xff" * 9


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (form(b"abc")[0], "multipart/form-data"),
        (form(b"abc")[0], "multipart/form-data; boundary=other"),
        (form(b"abc", "picture")[0], form(b"")[1]),
        (form(b"abc")[0][:-30], form(b"")[1]),
        (b"", form(b"")[1]),
        (b"\r\n" * 500, form(b"")[1]),
        (form(b"abc")[0].removesuffix(b"--\r\n") + b"\r\n" + form(b"def")[0], form(b"")[1]),
        (form(b"text")[0].replace(b'; filename="a.jpg"', b""), form(b"")[1]),
        (b"--b0undary\r\n" + b"X: y\r\n" * 5000 + b"\r\n\r\n--b0undary--\r\n", form(b"")[1]),
    ],
    ids=["no boundary", "other boundary", "other field", "cut", "empty", "blank", "two files",
         "no file", "headers"],
)  # fmt: skip
def test_a_broken_form_is_400(body: bytes, content_type: str):
    found = refusal(body, content_type=content_type)
    assert (found.status_code, found.kind) == (400, "form")


def test_too_many_bytes_are_413_declared_or_not():
    assert refusal(b"", content_length="100001").status_code == 413
    assert refusal(*[b"x" * 1000] * 101).status_code == 413
    body, content_type = form(b"x" * 100_001)
    assert refusal(body, content_type=content_type).status_code == 413
    assert len(read(b"x" * 100_000)) == 100_000


def test_a_slow_body_is_408():
    found = refusal(*[b"x"] * 9, pause_s=0.1)
    assert (found.status_code, found.kind) == (408, "read_timeout")


def test_an_empty_body_is_400():
    assert refusal().status_code == 400
    body, content_type = form(b"")
    assert refusal(body, content_type=content_type).status_code == 400


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_is_decoded_to_its_pixels(kind: str):
    image = random_image(1)
    found = decode_image(encoded(image, kind), CONFIG)
    assert found.mode == "RGB"
    difference = np.abs(np.asarray(found, int) - np.asarray(image, int)).mean()
    assert difference < (JPEG_LOSS if kind == "JPEG" else 1e-9)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_upright_image_is_rotated_by_its_exif_orientation(orientation: int):
    seen = random_image(2, 48, 32)
    back = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
            6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}[orientation]  # fmt: skip
    stored = seen if back is None else seen.transpose(Image.Transpose[back])
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(stored, exif=exif)

    as_stored = decode_image(content, CONFIG)
    upright = decode_image(content, CONFIG, upright=True)
    of_model = decode_image(content, CONFIG, PixelRules(exif="apply"))

    assert of_model.tobytes() == upright.tobytes()
    assert as_stored.size == stored.size
    assert upright.size == seen.size
    assert np.abs(np.asarray(upright, int) - np.asarray(seen, int)).mean() < JPEG_LOSS


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "BMP", "PDF"])
def test_other_formats_are_415(kind: str):
    found = not_decoded(encoded(random_image(), kind))
    assert (found.status_code, found.kind) == (415, "format")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_truncated_image_is_422(kind: str, share: float):
    content = encoded(random_image(3), kind)
    found = not_decoded(content[: max(8, int(share * len(content)))])
    assert (found.status_code, found.kind) == (422, "undecodable")


def test_too_many_pixels_are_413_by_the_header_alone():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    content += struct.pack(">I", zlib.crc32(chunk))
    found = not_decoded(content + b"\0" * 40)
    assert (found.status_code, found.kind) in ((413, "too_many_pixels"), (422, "undecodable"))

    whole = encoded(Image.new("L", (1001, 1000)), "PNG")
    assert not_decoded(whole).kind == "too_many_pixels"
    assert not_decoded(encoded(Image.new("L", (1001, 1000)))).kind == "too_many_pixels"


def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded():
    content = encoded(random_image(4, 640, 480), progressive=True)
    assert 2 <= count_scans(content) <= 12
    assert count_scans(encoded(random_image(4))) == 1
    start = content.rindex(b"\xff\xda")
    scan = content[start:-2]
    bomb = content[:-2] + scan * 500 + b"\xff\xd9"
    assert count_scans(bomb) == MAX_SCANS + 1
    assert "scans" in not_decoded(bomb).detail
    # They cannot be hidden behind a marker without a length either.
    hidden = content[:start] + b"\xff\x01" + scan * 500 + b"\xff\xd9"
    assert count_scans(hidden) == MAX_SCANS + 1


def test_bytes_in_exif_data_are_not_counted_as_scans():
    exif = Image.Exif()
    exif[0x9286] = b"\xff\xda" * 200  # a user's comment
    assert count_scans(encoded(random_image(), exif=exif)) == 1
