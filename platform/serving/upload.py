"""Read and decode the image in a request, within limits of bytes, pixels and time.

A body is counted while it arrives, so the limit also holds with a missing or wrong Content-Length.
The format is determined from the content; a declared type is refused only if it is neither JPEG nor
PNG. Other formats that training reads are not accepted here: every decoder is attack surface.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from deta.platform.data.image_decoding import (
    AS_STORED,
    PNG_SIGNATURE,
    ImageError,
    decode_bytes,
)
from deta.platform.data.image_sizes import PixelRules
from deta.platform.serving.config import ServingConfig
from deta.platform.system.origin_guard import Refusal

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it logs a line for each broken form

JPEG_SIGNATURE = b"\xff\xd8\xff"
RAW_TYPES = ("", "image/jpeg", "image/jpg", "image/png", "application/octet-stream")
FORM_TYPE = "multipart/form-data"
FIELD = "image"  # of a form
FORM_BYTES = 64 << 10  # what a form may contain besides the image
MAX_FIELDS = 4
MAX_DRAINED = 4  # times the limit; a longer body is not read to its end
MAX_SCANS = 64  # of a progressive JPEG, which usually has 10; each costs a pass over all pixels
CLOSE = {"Connection": "close"}

# Ends a JPEG's entropy-coded data: FF, then neither a stuffed zero, a restart marker nor a fill.
NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
START_OF_SCAN, END_OF_IMAGE, TEMPORARY = 0xDA, 0xD9, 0x01


async def read_image(
    headers: Mapping[str, str], body: AsyncIterator[bytes], config: ServingConfig
) -> bytes:
    """Return the bytes of the one image in a request.

    Args:
        headers: with names in lower case, or a case-insensitive mapping.

    Raises:
        Refusal: 400, 408, 413 or 415.
    """
    content_type = headers.get("content-type", "")
    kind, options = parse_options_header(content_type)
    media_type = kind.decode("latin-1").lower()
    if (encoding := headers.get("content-encoding", "")) and encoding.lower() != "identity":
        detail = f"Content-Encoding {encoding[:40]!r}: send it uncompressed"
        raise Refusal(415, "content_encoding", detail)
    if media_type not in (*RAW_TYPES, FORM_TYPE):
        raise Refusal(
            415,
            "content_type",
            f"Content-Type {media_type[:80]!r}: send image/jpeg, image/png, or a "
            f"{FORM_TYPE} with the file in the field {FIELD!r}",
        )
    is_form = media_type == FORM_TYPE
    limit = config.max_bytes + (FORM_BYTES if is_form else 0)
    length = headers.get("content-length", "")
    declared = int(length) if length.isdecimal() and len(length) < 20 else None
    too_large = f"more than {config.max_bytes:,} bytes; shrink the image"
    if declared is not None and declared > limit:
        # The rest of a refused body is read and discarded, so that the client sees the response.
        # If it is long or of unknown length, the connection is closed.
        raise Refusal(413, "too_large", too_large, CLOSE if declared > MAX_DRAINED * limit else {})

    async def limited() -> AsyncIterator[bytes]:
        num_bytes = 0
        async for part in body:
            num_bytes += len(part)
            if num_bytes > limit:
                raise Refusal(413, "too_large", too_large, CLOSE)
            yield part

    try:
        async with asyncio.timeout(config.read_timeout_s):
            if is_form:
                content = await _from_form(content_type, options, limited())
            else:
                content = b"".join([part async for part in limited()])
    except TimeoutError:
        raise Refusal(
            408,
            "read_timeout",
            f"the body did not arrive within {config.read_timeout_s:g} s, or is shorter than "
            "its Content-Length",
            CLOSE,
        ) from None
    if len(content) > config.max_bytes:
        raise Refusal(413, "too_large", too_large)
    if not content:
        raise Refusal(400, "empty", "the body is empty; send the bytes of a JPEG or PNG file")
    return content


def decode_image(
    content: bytes,
    config: ServingConfig,
    rules: PixelRules = AS_STORED,
    *,
    upright: bool = False,
) -> Image.Image:
    """Return the image as 8-bit RGB; see `image_decoding.decode_bytes`.

    Args:
        rules: those of the model.
        upright: rotate the image by its EXIF orientation, also for a model that ignores it.

    Raises:
        Refusal: 413 for too many pixels, 415 for another format, 422 if it does not decode.
        MemoryError: too little memory at the moment.
    """
    if not content.startswith((JPEG_SIGNATURE, PNG_SIGNATURE)):
        raise Refusal(
            415,
            "format",
            f"not a JPEG or PNG: it begins with {content[:12]!r}; convert it to JPEG or PNG",
        )
    if content.startswith(JPEG_SIGNATURE) and (scans := count_scans(content)) > MAX_SCANS:
        raise Refusal(
            422, "undecodable", f"a JPEG of {scans} scans, more than {MAX_SCANS}; save it again"
        )
    opened = _open_header(content)
    if opened is not None and math.prod(opened.size) > config.max_pixels:
        size = " x ".join(map(str, opened.size))
        detail = f"{size} pixels are more than {config.max_pixels:,}; shrink the image"
        raise Refusal(413, "too_many_pixels", detail)
    try:
        rules = replace(rules, exif="apply") if upright else rules
        return decode_bytes(content, Path("the image"), config.max_pixels, rules)
    except ImageError as error:
        raise Refusal(422, "undecodable", str(error)) from error


def count_scans(content: bytes) -> int:
    """Return the number of scans of a JPEG, at most `MAX_SCANS` + 1; up to the first error.

    A decoder processes the whole image once per scan, and a scan can be 10 bytes long: 100 kB can
    keep a processor busy for minutes.
    Source: https://libjpeg-turbo.org/pmwiki/uploads/About/TwoIssueswiththeJPEGStandard.pdf
    """
    scans, place = 0, 2
    while scans <= MAX_SCANS:
        marker = NEXT_MARKER.search(content, place)
        if marker is None or content[marker.start() + 1] == END_OF_IMAGE:
            break
        place = marker.end()
        if content[place - 1] == START_OF_SCAN:
            scans += 1
        elif content[place - 1] != TEMPORARY:  # a marker without a length
            place += int.from_bytes(content[place : place + 2], "big")
    return scans


class _Parser(MultiPartParser):
    spool_max_size = 1 << 40  # in memory, not on disk: the body is limited already


async def _from_form(
    content_type: str, options: Mapping[bytes, bytes], body: AsyncIterator[bytes]
) -> bytes:
    if not options.get(b"boundary"):
        raise Refusal(400, "form", "the Content-Type has no boundary; let your HTTP client set it")
    parser = _Parser(
        Headers({"content-type": content_type}),
        body,  # type: ignore[arg-type]
        max_files=1,
        max_fields=MAX_FIELDS,
        max_part_size=FORM_BYTES,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, LookupError) as error:  # charset names, header bytes
        reason = getattr(error, "message", error)
        raise Refusal(400, "form", f"the form cannot be read: {reason}") from error
    try:
        upload = form.get(FIELD)
        if not isinstance(upload, UploadFile):
            names = ", ".join(repr(name[:40]) for name in form) or "no fields"
            detail = f"no file in the field {FIELD!r} of the form; it has {names}"
            raise Refusal(400, "form", detail)
        return await upload.read()
    finally:
        await form.close()


def _open_header(content: bytes) -> ImageFile.ImageFile | None:
    """Return the image with its header read; None if it is broken, which decoding reports."""
    opener = JpegImageFile if content.startswith(JPEG_SIGNATURE) else PngImageFile
    try:
        return opener(BytesIO(content))
    except MemoryError:
        raise
    except Exception:  # as in image_decoding.py
        return None
