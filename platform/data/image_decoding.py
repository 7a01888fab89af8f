"""Decode an image file to 8-bit RGB, completely or not at all.

The format is recognised by content, never by name: JPEG (the first image of an MPO), PNG (the
default image of an animated one), BMP, WebP (first frame) and TIFF (first page). Every other format
is refused, GIF too: it cannot store a photograph without loss, and mostly holds an animation.

Pixels are converted as follows:

- Grey, palette and bilevel images become RGB. 16-bit grey is divided by 257, because PIL alone
  would turn it white; or a range of it is stretched to 0 .. 255 (`PixelRules`). PIL converts CMYK,
  and knows that Adobe stores it inverted.
- Alpha is dropped, not composited: the colours under it were annotated.
- The EXIF orientation is ignored, as in COCO and DETA, where boxes refer to the stored pixels;
  or it is applied (`PixelRules`). That of a TIFF is always applied, by PIL. `image_folder.py`
  counts such images, and compares both sizes with the annotated one.
- Float, 32-bit integer and Lab images are refused, because they do not define white.

A file that decodes only in part is an error: a missing end, even of two bytes, a broken scan, or a
PNG chunk with a wrong checksum, which PIL does not check for pixels. One fault stays undetected: a
JPEG that was cut and then closed by a valid end marker.
"""

from __future__ import annotations

import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EINVAL, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from deta.platform.data.image_sizes import PixelRules

MAX_PIXELS = 50_000_000  # 150 MB as RGB, 600 MB as the float tensor of a model input
BYTES_PER_PIXEL = 8  # uncompressed 16-bit RGBA: no accepted file needs more
OTHER_BYTES = 16 << 20  # allowed besides the pixels: previews, profiles, text

AS_STORED = PixelRules()
ORIENTATION = ExifTags.Base.Orientation
HOLD_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # PIL's `info`
SWAPPING = frozenset({5, 6, 7, 8})  # orientations that exchange width and height
_WAYS = Image.Transpose
UPRIGHT = {
    2: _WAYS.FLIP_LEFT_RIGHT, 3: _WAYS.ROTATE_180, 4: _WAYS.FLIP_TOP_BOTTOM, 5: _WAYS.TRANSPOSE,
    6: _WAYS.ROTATE_270, 7: _WAYS.TRANSVERSE, 8: _WAYS.ROTATE_90,
}  # fmt: skip

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
FORMATS: tuple[tuple[re.Pattern[bytes], type[ImageFile.ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    (re.compile(PNG_SIGNATURE), PngImageFile),
    (re.compile(rb"BM"), BmpImageFile),
    (re.compile(rb"(?s)RIFF....WEBP"), WebPImageFile),
    # Little and big endian, 32 and 64 bit.
    (re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImageFile),
)
LFS_POINTER = b"version https://git-lfs"

# PIL modes whose values use the full 8-bit range, so that convert("RGB") is correct.
EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})

# File system errors that a retry does not fix: the data set is at fault. Any other error, such as a
# network failure, is passed on, so that no image is skipped because of it.
PERMANENT_ERRORS = {EACCES, EINVAL, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM}


class ImageError(ValueError):
    """An unusable image; the message names the file and the reason."""


class Header(NamedTuple):
    """Size in pixels and bytes of an image file, read without decoding pixels."""

    width: int  # as it is decoded: upright if the rules say so
    height: int
    num_bytes: int
    orientation: int = 1  # EXIF, 1 to 8; 1: stored upright
    is_sixteen_bit: bool = False  # grey of 16 bits
    is_deep_colour: bool = False  # colours of 16 bits, of which PIL keeps the higher 8

    @property
    def turned(self) -> tuple[int, int]:
        """(width, height) with the other way to treat the orientation."""
        swaps = self.orientation in SWAPPING
        return (self.height, self.width) if swaps else (self.width, self.height)


def read_header(path: Path, max_pixels: int = MAX_PIXELS, rules: PixelRules = AS_STORED) -> Header:
    """Read the header of an image file; no pixel is decoded.

    Raises:
        ImageError: the file is missing, not of an accepted format, has over `max_pixels`, or many
            more bytes than its pixels need.
        OSError: the storage failed.
    """
    num_bytes = _file_size(path, max_pixels)
    with _permanent_errors_as_image_errors(path), open(path, "rb") as file:
        image = _open_header(file, path, max_pixels, num_bytes)
        orientation = orientation_of(image)
        is_grey = image.mode.startswith("I;16")
        # The decoder's arguments name the stored form, such as "RGB;16B".
        is_deep = not is_grey and any(";16" in str(tile) for tile in image.tile)
        stored = Header(*image.size, num_bytes, orientation, is_grey, is_deep)
        if rules.exif == "apply":
            return stored._replace(width=stored.turned[0], height=stored.turned[1])
        return stored


def orientation_of(image: ImageFile.ImageFile) -> int:
    """Return the EXIF orientation of an image whose header is read; 1 if missing or invalid."""
    if isinstance(image, TiffImageFile):
        return 1  # PIL turns it
    if image.info.keys().isdisjoint(HOLD_ORIENTATION):
        return 1  # most images; parsing takes longer than the header
    try:
        # Not the method of PngImageFile, which decodes all pixels to find EXIF behind them.
        orientation = int(Image.Image.getexif(image).get(ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # of every type, from malformed EXIF
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def decode(path: Path, max_pixels: int = MAX_PIXELS, rules: PixelRules = AS_STORED) -> Image.Image:
    """Decode an image file to 8-bit RGB, without EXIF, text and other metadata.

    It is safe to call from several threads and after a fork; no file stays open.

    Raises:
        ImageError: as for `read_header`, or the file does not decode completely.
        OSError: the storage failed.
    """
    return decode_bytes(read_file(path, max_pixels), path, max_pixels, rules)


def read_file(path: Path, max_pixels: int = MAX_PIXELS) -> bytes:
    """Read all bytes of an image file without decoding them.

    Raises:
        ImageError: the file is missing, empty, not a regular file, or too large for `max_pixels`.
        OSError: the storage failed.
    """
    _file_size(path, max_pixels)
    with _permanent_errors_as_image_errors(path):
        return path.read_bytes()


def decode_bytes(
    content: bytes, path: Path, max_pixels: int = MAX_PIXELS, rules: PixelRules = AS_STORED
) -> Image.Image:
    """Decode bytes as `decode` does; errors name them by `path`."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so half-decoded images would go "
            "unnoticed; find the library that sets it and set it back to False"
        )
    if content.startswith(PNG_SIGNATURE):
        _check_png_chunks(content, path)

    image = _open_header(BytesIO(content), path, max_pixels, len(content))
    orientation = orientation_of(image) if rules.exif == "apply" else 1
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # decoders raise errors of every type for malformed bytes
        raise ImageError(
            f"{path}: does not decode completely ({error}); download or export the file again"
        ) from error
    rgb = _to_rgb(image, path, rules)
    return rgb.transpose(UPRIGHT[orientation]) if orientation != 1 else rgb


def sixteen_bit_values(content: bytes, path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the values of a 16-bit grey image, H W uint16; empty for any other image.

    Raises:
        ImageError: the header is broken, or the file does not decode.
    """
    image = _open_header(BytesIO(content), path, max_pixels, len(content))
    if not image.mode.startswith("I;16"):
        return np.zeros((0, 0), np.uint16)
    try:
        return np.asarray(image).astype(np.uint16)
    except MemoryError:
        raise
    except Exception as error:  # as in decode_bytes
        raise ImageError(f"{path}: does not decode completely ({error})") from error


def _file_size(path: Path, max_pixels: int) -> int:
    """Return the size in bytes of a regular file; refuse absurdly large ones."""
    with _permanent_errors_as_image_errors(path):
        status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or pipe"
        raise ImageError(f"{path}: is {kind}, not an image file")
    if status.st_size == 0:
        raise ImageError(f"{path}: is empty; download the file again")
    if status.st_size > BYTES_PER_PIXEL * max_pixels + OTHER_BYTES:
        raise ImageError(
            f"{path}: has {status.st_size:,} bytes, more than any image of "
            f"max_pixels={max_pixels:,} needs"
        )
    return status.st_size


def _open_header(
    file: BinaryIO, path: Path, max_pixels: int, num_bytes: int
) -> ImageFile.ImageFile:
    """Return the image with its header read and no pixel decoded.

    This calls the class of the format, not `PIL.Image.open`, whose pixel limit is one number for
    the whole process and partly only a warning. Here the caller's limit applies, as an error.
    """
    head = file.read(32)
    file.seek(0)
    if head.startswith(LFS_POINTER):
        raise ImageError(f"{path}: is a Git LFS pointer, not the image; run `git lfs pull`")
    format_class = next((each for begins, each in FORMATS if begins.match(head)), None)
    if format_class is None:
        raise ImageError(
            f"{path}: is not JPEG, PNG, BMP, WebP or TIFF but begins with {head[:12]!r}; "
            "convert it, or download it again"
        )
    try:
        image = format_class(file)
    except MemoryError:
        raise
    except Exception as error:  # of every type, as from the decoders
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a storage error, not a content error
        raise ImageError(
            f"{path}: has a broken header ({error}); download the file again"
        ) from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{path}: has {width} x {height} pixels, more than max_pixels={max_pixels:,}; "
            "shrink it, or raise the limit"
        )
    if num_bytes > BYTES_PER_PIXEL * width * height + OTHER_BYTES:
        raise ImageError(
            f"{path}: has {num_bytes:,} bytes, more than {width} x {height} pixels need and "
            f"{OTHER_BYTES >> 20} MiB besides them; export it again without metadata and previews"
        )
    return image


def _check_png_chunks(content: bytes, path: Path) -> None:
    """Refuse a PNG that ends early or has a wrong checksum; ignore bytes after its end.

    Source: PNG specification, section 5.3, https://www.w3.org/TR/png-3/#5Chunk-layout
    """
    view = memoryview(content)
    start, name = len(PNG_SIGNATURE), b""
    while name != b"IEND":
        length = int.from_bytes(view[start : start + 4], "big")
        end = start + 8 + length
        if end + 4 > len(view):
            raise ImageError(f"{path}: ends before its IEND chunk; download the file again")
        name = bytes(view[start + 4 : start + 8])
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ImageError(
                f"{path}: chunk {name!r} has a wrong checksum; download the file again"
            )
        start = end + 4


def _to_rgb(image: ImageFile.ImageFile, path: Path, rules: PixelRules) -> Image.Image:
    image.info.clear()  # PIL would warn about transparency, and copy EXIF and text
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)  # H W, 0 to 65535 = 255 * 257
        least, most = 0, 65535
        if rules.sixteen_bit == "stretch":
            if rules.sixteen_bit_range is None:
                raise ImageError(
                    f"{path}: has 16 bits, and data.sixteen_bit=stretch needs the range of the "
                    "data set: data.sixteen_bit_range=LEAST,MOST"
                )
            least, most = rules.sixteen_bit_range
        span = most - least
        levels = ((grey - least).clip(0, span) * 255 + span // 2) // span
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode not in EIGHT_BIT_MODES:
        raise ImageError(
            f"{path}: has pixels of PIL's mode {image.mode}, which does not define white; "
            "convert it to 8 bits"
        )
    return image.convert("RGB")


@contextmanager
def _permanent_errors_as_image_errors(path: Path) -> Iterator[None]:
    """Convert permanent file system errors to ImageError."""
    try:
        yield
    except OSError as error:
        if error.errno not in PERMANENT_ERRORS:
            raise
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from error
