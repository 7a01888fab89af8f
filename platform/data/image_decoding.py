"""Image file to 8-bit RGB, whole or not at all.

What is accepted, by content and never by name: JPEG (of a multi-picture MPO the first), PNG (of an
animated one the default picture), BMP, WebP (first frame) and TIFF (first page). All else is
refused, GIF included: it cannot hold a photograph without loss, and mostly holds a film.

What becomes of the pixels:

- Grey, palette and bilevel pictures become RGB. 16-bit grey is divided by 257, as PIL alone would
  turn it white. CMYK is converted by PIL, which knows that Adobe stores it inverted.
- Alpha is dropped, not composited: the colours under it are what was annotated.
- The EXIF orientation is ignored, as in COCO and DETA, where boxes refer to the stored pixels.
  A file annotated as shown has other sizes than stored, and the size check of `coco.py` finds it.
- Float, 32-bit integer and Lab pictures are refused, for they do not say what is white.

A file that decodes only in part is an error: a lost end, even of two bytes, a broken scan, or a PNG
chunk whose checksum is wrong, which PIL does not check for pixels. One thing no decoder here
reports is a JPEG that was cut and then closed by a valid end marker.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

PROGRESS_AFTER_S = 3.0


MAX_PIXELS = 50_000_000  # 150 MB as RGB, 600 MB as the float tensor a model eats
BYTES_PER_PIXEL = 8  # uncompressed 16-bit RGBA: no accepted file needs more
OTHER_BYTES = 16 << 20  # what a file may hold beside its pixels: previews, profiles, text

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # little and big endian, 32 and 64 bit
LFS_POINTER = b"version https://git-lfs"

# PIL modes whose values run over the whole of 8 bits, so that convert("RGB") means what it says.
EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})

# Errors of the file system that come back on every attempt: the data set is at fault. Any other,
# a network that failed for one, is passed on, so that no picture is skipped for it.
LASTING_ERRORS = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EACCES,
        errno.EPERM,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EINVAL,
    }
)


class ImageError(ValueError):
    """A picture that cannot be used; the message names the file and the reason."""


class Header(NamedTuple):
    """What is known of an image file before its pixels are decoded."""

    width: int
    height: int
    num_bytes: int


def read_header(path: Path, max_pixels: int = MAX_PIXELS) -> Header:
    """Size in pixels and bytes of an image file; no pixel is decoded.

    Raises:
        ImageError: the file is missing, not of an accepted format, has over `max_pixels`, or many
            more bytes than its pixels need.
        OSError: the storage failed.
    """
    num_bytes = _file_size(path, max_pixels)
    with _reading(path), open(path, "rb") as file:
        return Header(*_open_header(file, path, max_pixels, num_bytes).size, num_bytes)


def decode(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """All pixels of an image file as 8-bit RGB; without EXIF, text and other baggage.

    Safe to call from several threads and after a fork; no file stays open.

    Raises:
        ImageError: as for `read_header`, or the file does not decode completely.
        OSError: the storage failed.
    """
    return decode_bytes(read_file(path, max_pixels), path, max_pixels)


def read_file(path: Path, max_pixels: int = MAX_PIXELS) -> bytes:
    """All bytes of an image file, not yet looked into.

    Raises:
        ImageError: the file is missing, empty, no file, or larger than `max_pixels` can need.
        OSError: the storage failed.
    """
    _file_size(path, max_pixels)
    with _reading(path):
        return path.read_bytes()


def decode_bytes(content: bytes, path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """As `decode`, of bytes that were read before; `path` is what an error calls them."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so half-decoded pictures would pass "
            "unseen; find the library that sets it and set it back to False"
        )
    if content.startswith(PNG_SIGNATURE):
        _check_png_chunks(content, path)

    image = _open_header(BytesIO(content), path, max_pixels, len(content))
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # decoders meet malformed bytes with errors of every type
        raise ImageError(
            f"{path}: does not decode completely ({error}); fetch or export the file again"
        ) from error
    return _to_rgb(image, path)


def _file_size(path: Path, max_pixels: int) -> int:
    """Size in bytes of what is a regular file and not absurdly large."""
    with _reading(path):
        status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or pipe"
        raise ImageError(f"{path}: is {kind}, not an image file")
    if status.st_size == 0:
        raise ImageError(f"{path}: is empty; fetch the file again")
    if status.st_size > BYTES_PER_PIXEL * max_pixels + OTHER_BYTES:
        raise ImageError(
            f"{path}: has {status.st_size:,} bytes, more than any picture of "
            f"max_pixels={max_pixels:,} needs"
        )
    return status.st_size


def _open_header(
    file: BinaryIO, path: Path, max_pixels: int, num_bytes: int
) -> ImageFile.ImageFile:
    """The picture with its header read and no pixel yet.

    Calls the format's class and not `PIL.Image.open`, whose pixel limit is one number for the
    whole process and, in part, only a warning. Here the caller's limit holds, as an error.
    """
    head = file.read(32)
    file.seek(0)
    format_class = _format_class(head)
    if format_class is None and head.startswith(LFS_POINTER):
        raise ImageError(f"{path}: is a Git LFS pointer, not the picture; run `git lfs pull`")
    if format_class is None:
        raise ImageError(
            f"{path}: is not JPEG, PNG, BMP, WebP or TIFF but begins with {head[:12]!r}; "
            "convert it, or fetch it again"
        )
    try:
        image = format_class(file)
    except MemoryError:
        raise
    except Exception as error:  # as for the decoders
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the storage, not the content
        raise ImageError(f"{path}: has a broken header ({error}); fetch the file again") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{path}: has {width} x {height} pixels, more than max_pixels={max_pixels:,}; "
            "shrink it, or raise the limit"
        )
    if num_bytes > BYTES_PER_PIXEL * width * height + OTHER_BYTES:
        raise ImageError(
            f"{path}: has {num_bytes:,} bytes, more than {width} x {height} pixels need and "
            f"{OTHER_BYTES >> 20} MiB beside them; export it again without what else it holds"
        )
    return image


def _format_class(head: bytes) -> type[ImageFile.ImageFile] | None:
    if head.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if head.startswith(PNG_SIGNATURE):
        return PngImageFile
    if head.startswith(b"BM"):
        return BmpImageFile
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return WebPImageFile
    if head.startswith(TIFF_SIGNATURES):
        return TiffImageFile
    return None


def _check_png_chunks(content: bytes, path: Path) -> None:
    """Refuse a PNG that ends early or has a wrong checksum. Bytes after its end are ignored.

    Source: PNG specification, section 5.3, https://www.w3.org/TR/png-3/#5Chunk-layout
    """
    view = memoryview(content)
    start = len(PNG_SIGNATURE)
    name = b""
    while name != b"IEND":
        if start + 12 > len(view):
            raise ImageError(f"{path}: ends before its IEND chunk; fetch the file again")
        (length,) = struct.unpack_from(">I", view, start)
        end = start + 8 + length
        if end + 4 > len(view):
            raise ImageError(f"{path}: ends in the middle of a chunk; fetch the file again")
        name = bytes(view[start + 4 : start + 8])
        (checksum,) = struct.unpack_from(">I", view, end)
        if zlib.crc32(view[start + 4 : end]) != checksum:
            raise ImageError(f"{path}: chunk {name!r} has a wrong checksum; fetch the file again")
        start = end + 4


def _to_rgb(image: ImageFile.ImageFile, path: Path) -> Image.Image:
    image.info.clear()  # PIL would warn about transparency, and carry EXIF and text along
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)  # H W, 0 to 65535 = 255 * 257
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode not in EIGHT_BIT_MODES:
        raise ImageError(
            f"{path}: has pixels of PIL's mode {image.mode}, whose white is not defined; "
            "convert it to 8 bits"
        )
    return image.convert("RGB")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors of the file system that would come back into ImageError."""
    try:
        yield
    except OSError as error:
        if error.errno not in LASTING_ERRORS:
            raise
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from error
