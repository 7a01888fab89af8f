"""The body of a request to a decoded picture: nothing larger, slower or stranger gets through.

A body is counted while it arrives, so that one without or with a wrong Content-Length ends at the
limit too. What it holds is judged by its content, as everywhere in this project; a type that it
declares is refused only where it promises something else than a JPEG or PNG. Other formats that
training reads are not accepted here: every decoder is a door.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Mapping
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from deta.platform.data.image_decoding import PNG_SIGNATURE, ImageError, decode_bytes
from deta.platform.serving.config import Refusal, ServingConfig

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a line for each broken form

JPEG_SIGNATURE = b"\xff\xd8\xff"
RAW_TYPES = ("", "image/jpeg", "image/jpg", "image/png", "application/octet-stream")
FORM_TYPE = "multipart/form-data"
FIELD = "image"  # of a form
FORM_BYTES = 64 << 10  # what a form may hold beside the picture
MAX_FIELDS = 4
PATIENCE = 4  # times the limit
MAX_SCANS = 64  # of a progressive JPEG, which usually has 10; each costs a pass over all pixels
ORIENTATION = 0x0112  # the tag of EXIF

# Ends a JPEG's entropy-coded data: FF, then neither a stuffed zero, a restart marker nor a fill.
NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
START_OF_SCAN, END_OF_IMAGE, TEMPORARY = 0xDA, 0xD9, 0x01

# EXIF orientation to what turns the picture upright. Source: EXIF 2.3, section 4.6.4.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


async def read_picture(
    headers: Mapping[str, str], body: AsyncIterator[bytes], config: ServingConfig
) -> bytes:
    """The bytes of the one picture in a request.

    Args:
        headers: with names in lower case, or a mapping that does not mind.

    Raises:
        Refusal: 400, 408, 413 or 415.
    """
    content_type = headers.get("content-type", "")
    kind, options = parse_options_header(content_type)
    media_type = kind.decode("latin-1").lower()
    if (encoding := headers.get("content-encoding", "")) and encoding.lower() != "identity":
        raise Refusal(
            415, "content_encoding", f"Content-Encoding {encoding[:40]!r}: send it unpacked"
        )
    if media_type not in (*RAW_TYPES, FORM_TYPE):
        raise Refusal(
            415,
            "content_type",
            f"Content-Type {media_type[:80]!r}: send image/jpeg, image/png, or a "
            f"{FORM_TYPE} with the file in the field {FIELD!r}",
        )
    is_form = media_type == FORM_TYPE
    limit = config.max_bytes + (FORM_BYTES if is_form else 0)
    declared = _length(headers)
    # What remains of a body is read and forgotten, so that its sender gets to see the answer; one
    # without an end in sight is cut off.
    closes = declared is None or declared > PATIENCE * limit
    if declared is not None and declared > limit:
        raise _too_large(config, closes)
    try:
        async with asyncio.timeout(config.read_timeout_s):
            if is_form:
                picture = await _from_form(content_type, options, _counted(body, limit, config))
            else:
                picture = b"".join([part async for part in _counted(body, limit, config)])
    except TimeoutError:
        raise Refusal(
            408,
            "read_timeout",
            f"the body did not arrive within {config.read_timeout_s:g} s, or is shorter than "
            "its Content-Length",
            {"Connection": "close"},
        ) from None
    if len(picture) > config.max_bytes:
        raise _too_large(config, closes=False)
    if not picture:
        raise Refusal(400, "empty", "the body is empty; send the bytes of a JPEG or PNG file")
    return picture


def decode_picture(content: bytes, config: ServingConfig, *, upright: bool = False) -> Image.Image:
    """All pixels as 8-bit RGB, as `images.decode_bytes` makes them.

    Args:
        upright: turn the picture as its EXIF orientation says; without, as stored, as in training.

    Raises:
        Refusal: 413 for too many pixels, 415 for another format, 422 for what does not decode.
    """
    if not content.startswith((JPEG_SIGNATURE, PNG_SIGNATURE)):
        raise Refusal(
            415,
            "format",
            f"not a JPEG or PNG: it begins with {content[:12]!r}; convert it and send it again",
        )
    if content.startswith(JPEG_SIGNATURE) and (scans := count_scans(content)) > MAX_SCANS:
        raise Refusal(
            422, "undecodable", f"a JPEG of {scans} scans, more than {MAX_SCANS}; save it anew"
        )
    size = _size(content)
    if size is not None and size[0] * size[1] > config.max_pixels:
        raise Refusal(
            413,
            "too_many_pixels",
            f"{size[0]} x {size[1]} pixels are more than {config.max_pixels:,}; shrink the picture",
        )
    orientation = _orientation(content) if upright else 1
    try:
        image = decode_bytes(content, Path("the picture"), config.max_pixels)
    except ImageError as error:
        raise Refusal(422, "undecodable", str(error)) from error
    except MemoryError as error:
        raise Refusal(503, "memory", "too little memory for this picture just now") from error
    turn = UPRIGHT.get(orientation)
    return image if turn is None else image.transpose(turn)


def count_scans(content: bytes) -> int:
    """How many scans a JPEG has, at most one more than `MAX_SCANS`. Broken ones count so far.

    A decoder goes over the whole picture once a scan, and a scan can be 10 bytes long: some 100 kB
    can keep a processor busy for minutes.
    Source: https://libjpeg-turbo.org/pmwiki/uploads/About/TwoIssueswiththeJPEGStandard.pdf
    """
    scans, place = 0, 2
    while scans <= MAX_SCANS:
        found = NEXT_MARKER.search(content, place)
        if found is None or content[found.start() + 1] == END_OF_IMAGE:
            break
        place = found.end()
        if content[place - 1] == START_OF_SCAN:
            scans += 1
        elif content[place - 1] != TEMPORARY:  # which has no length
            place += int.from_bytes(content[place : place + 2], "big")
    return scans


async def _counted(
    body: AsyncIterator[bytes], limit: int, config: ServingConfig
) -> AsyncIterator[bytes]:
    num_bytes = 0
    async for part in body:
        num_bytes += len(part)
        if num_bytes > limit:
            raise _too_large(config, closes=True)
        yield part


class _Parser(MultiPartParser):
    spool_max_size = 1 << 40  # in memory: the body is counted already, and nothing goes to a disk


async def _from_form(
    content_type: str, options: Mapping[bytes, bytes], body: AsyncIterator[bytes]
) -> bytes:
    if not options.get(b"boundary"):
        raise Refusal(400, "form", "the Content-Type has no boundary; let your client write it")
    parser = _Parser(
        Headers({"content-type": content_type}),
        body,  # type: ignore[arg-type]
        max_files=1,
        max_fields=MAX_FIELDS,
        max_part_size=FORM_BYTES,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refusal(400, "form", f"the form cannot be read: {error.message}") from error
    except (ValueError, KeyError, LookupError) as error:  # charset names, header bytes
        raise Refusal(400, "form", f"the form cannot be read: {error}") from error
    try:
        found = form.get(FIELD)
        if not isinstance(found, UploadFile):
            names = ", ".join(repr(name[:40]) for name in form) or "no field at all"
            raise Refusal(
                400, "form", f"no file in the field {FIELD!r} of the form; it has {names}"
            )
        return await found.read()
    finally:
        await form.close()


def _too_large(config: ServingConfig, closes: bool) -> Refusal:
    what = f"more than {config.max_bytes:,} bytes; shrink the picture"
    return Refusal(413, "too_large", what, {"Connection": "close"} if closes else None)


def _length(headers: Mapping[str, str]) -> int | None:
    """Content-Length; none where there is none, or none that makes sense."""
    declared = headers.get("content-length", "")
    return int(declared) if declared.isdecimal() and len(declared) < 20 else None


def _size(content: bytes) -> tuple[int, int] | None:
    """(width, height) by the header, none where it is broken."""
    opened = _opened(content)
    return None if opened is None else opened.size


def _orientation(content: bytes) -> int:
    """1 to 8 by EXIF; 1 where it says nothing, or nonsense."""
    opened = _opened(content)
    if opened is None or (isinstance(opened, PngImageFile) and "exif" not in opened.info):
        return 1  # PIL would decode all of a PNG to look for EXIF behind its pixels
    try:
        return int(opened.getexif().get(ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # EXIF is a tangle of offsets; what cannot be read says nothing
        return 1


def _opened(content: bytes) -> ImageFile.ImageFile | None:
    opener = JpegImageFile if content.startswith(JPEG_SIGNATURE) else PngImageFile
    try:
        return opener(BytesIO(content))
    except MemoryError:
        raise
    except Exception:  # as in images.py; decoding will say what is wrong with it
        return None
