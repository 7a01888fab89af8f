"""Test `image_decoding.py`."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import struct
import subprocess
import sys
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from deta.platform.data.image_decoding import (
    ImageError,
    decode,
    read_header,
    sixteen_bit_values,
)
from deta.platform.data.image_sizes import PixelRules

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[3] / "../shared")
).resolve()
BAD = SHARED / "bad"
CATALOGUE = (
    json.loads((BAD / "catalogue.json").read_text()) if (BAD / "catalogue.json").exists() else {}
)
LOADED = {
    name.removeprefix("images/"): case["should"]
    for name, case in CATALOGUE.items()
    if name.startswith("images/") and case["ok"]
}
LIKE_GOOD = [name for name, should in LOADED.items() if "good" in should]
GREY = [name for name, should in LOADED.items() if "equal channels" in should]


def photo(width: int = 64, height: int = 48) -> Image.Image:
    """Smooth and coloured, so that JPEG keeps it and a swap of channels shows."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 200 / width + 40, y * 120 / height, 90 + 0 * x], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def mean(image: Image.Image) -> np.ndarray:
    return np.asarray(image).mean(axis=(0, 1))


@pytest.mark.parametrize(
    ("mode", "suffix", "options"),
    [
        ("RGB", "png", {}),
        ("RGB", "jpg", {"quality": 95}),
        ("RGB", "jpg", {"quality": 95, "progressive": True}),
        ("CMYK", "jpg", {"quality": 95}),
        ("RGB", "bmp", {}),
        ("RGB", "webp", {"lossless": True}),
        ("RGB", "tif", {}),
        ("RGB", "tif", {"compression": "tiff_lzw"}),
        ("CMYK", "tif", {}),
        ("RGBA", "png", {}),
        ("P", "png", {}),
    ],
)
def test_colours_are_the_same_in_every_format(
    mode: str, suffix: str, options: dict, tmp_path: Path
) -> None:
    path = tmp_path / f"x.{suffix}"
    photo().convert(mode).save(path, **options)

    image = decode(path)

    assert (image.mode, image.size) == ("RGB", (64, 48))
    assert read_header(path)[:3] == (64, 48, path.stat().st_size)
    # JPEG at quality 95 and a palette of 216 colours move the mean by a few levels at most.
    assert np.abs(mean(image) - mean(photo())).max() < (8 if mode == "P" else 2)


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_alpha_is_dropped_and_not_composited(alpha: int, tmp_path: Path) -> None:
    image = photo()
    image.putalpha(alpha)
    image.save(tmp_path / "x.png")

    assert decode(tmp_path / "x.png").tobytes() == photo().tobytes()


def test_a_palette_with_transparency_becomes_rgb_without_a_warning(tmp_path: Path) -> None:
    image = photo().quantize(16)
    image.save(tmp_path / "x.png", transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(tmp_path / "x.png").mode == "RGB"


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_divided_by_257(suffix: str, tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(grey).save(tmp_path / f"x.{suffix}")

    pixels = np.asarray(decode(tmp_path / f"x.{suffix}"))

    assert (pixels == (grey // 257)[..., None]).all()


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match=r"x\.tif: has pixels of PIL's mode F"):
        decode(tmp_path / "x.tif")


def test_exif_orientation_is_ignored_and_not_passed_on(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().save(tmp_path / "x.jpg", exif=exif)

    image = decode(tmp_path / "x.jpg")

    assert image.size == (64, 48)
    assert not image.info
    assert not image.getexif()


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif"])
def test_a_file_cut_anywhere_is_an_error_that_names_it(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    photo().save(path)
    content = path.read_bytes()
    # TIFF may end in bytes that describe nothing; the other formats end in what they need.
    for keep in [0, 1, 10, *np.linspace(20, len(content) * 0.95, 25).astype(int).tolist()]:
        path.write_bytes(content[:keep])
        with pytest.raises(ImageError, match=f"x.{suffix}"):
            decode(path)


@pytest.mark.parametrize("position", [0.1, 0.5, 0.99])
def test_a_png_with_one_flipped_bit_is_an_error(position: float, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    photo().save(path)
    content = bytearray(path.read_bytes())
    content[8 + int((len(content) - 9) * position)] ^= 16
    path.write_bytes(content)

    with pytest.raises(ImageError, match=r"x\.png"):
        decode(path)


def test_the_first_image_of_several_is_taken(tmp_path: Path) -> None:
    other = Image.new("RGB", (64, 48))
    for suffix in ("png", "webp", "tif", "mpo"):
        path = tmp_path / f"x.{suffix}"
        options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
        photo().save(path, save_all=True, append_images=[other], **options)
        assert np.abs(mean(decode(path)) - mean(photo())).max() < 2, suffix


def test_a_gif_is_refused_with_the_formats_that_are_not(tmp_path: Path) -> None:
    photo().save(tmp_path / "x.gif")
    with pytest.raises(ImageError, match=r"x\.gif: is not JPEG, PNG, BMP, WebP or TIFF.*b'GIF8"):
        read_header(tmp_path / "x.gif")


def test_a_git_lfs_pointer_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ImageError, match=r"x\.jpg: is a Git LFS pointer"):
        read_header(tmp_path / "x.jpg")


def png_chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def test_a_bomb_is_refused_from_its_header(tmp_path: Path) -> None:
    """In a process of its own, whose memory has not been large before."""
    header = struct.pack(">IIBBBBB", 200_000, 200_000, 1, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    content += png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(content)
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from deta.platform.data.image_decoding import ImageError, decode, read_header\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for read in (read_header, decode):\n"
        "    try: read(Path(sys.argv[1]))\n"
        "    except ImageError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "bomb.png")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[3],
    )

    *errors, grown_kb = ran.stdout.splitlines()
    assert len([error for error in errors if "more than max_pixels=50,000,000" in error]) == 2
    assert int(grown_kb) < 50_000


def test_the_pixel_limit_is_the_callers_and_not_that_of_pil(tmp_path: Path) -> None:
    photo().save(tmp_path / "x.png")
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = 10
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert decode(tmp_path / "x.png", max_pixels=64 * 48).size == (64, 48)
    finally:
        Image.MAX_IMAGE_PIXELS = before
    with pytest.raises(ImageError, match="64 x 48 pixels"):
        decode(tmp_path / "x.png", max_pixels=64 * 48 - 1)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_small_image_with_much_behind_it_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"stuffed.{suffix}"
    photo().save(path)
    content = path.read_bytes()
    path.write_bytes(content + bytes(20 << 20))

    for read in (read_header, decode):
        with pytest.raises(ImageError, match=r"stuffed.*64 x 48 pixels need"):
            read(path)
    path.write_bytes(content + bytes(10 << 20))  # previews, profiles, text: some is borne
    assert decode(path).size == (64, 48)


def test_decoding_refuses_to_run_where_pil_hides_truncation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo().save(tmp_path / "x.png")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
        decode(tmp_path / "x.png")


def test_random_bytes_behind_a_signature_are_an_error_or_an_image(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for suffix in ("png", "jpg", "bmp", "webp", "tif"):
        good = BytesIO()
        photo().save(good, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
        for _ in range(30):
            content = bytearray(good.getvalue())
            for place in random.integers(2, len(content), 8).tolist():
                content[place] = int(random.integers(0, 256))
            path = tmp_path / f"x.{suffix}"
            path.write_bytes(content)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of TIFF tags
                with contextlib.suppress(ImageError):  # any other error fails the test
                    assert decode(path).mode == "RGB"


def test_no_file_stays_open(tmp_path: Path) -> None:
    photo().save(tmp_path / "x.tif")
    photo().save(tmp_path / "x.webp")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(min(50, limit)):
        read_header(tmp_path / "x.tif")
        read_header(tmp_path / "x.webp")
        decode(tmp_path / "x.tif")

    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("name", LIKE_GOOD)
def test_bad_image_content_is_that_of_the_good_one(name: str) -> None:
    """The same photograph in other clothes has the same mean, within JPEG's losses."""
    good = decode(BAD / "images" / "good.jpg")

    assert np.abs(mean(decode(BAD / "images" / name)) - mean(good)).max() < 4


@pytest.mark.parametrize("name", GREY)
def test_bad_image_without_colour_has_three_equal_channels(name: str) -> None:
    pixels = np.asarray(decode(BAD / "images" / name))

    assert (pixels == pixels[..., :1]).all()
    assert pixels.std() > 1


# --- Orientation and 16 bits ---------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(64, 48), (48, 48)])
def test_orientation_is_applied_if_asked_and_the_header_agrees(
    orientation: int, suffix: str, size: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    photo(*size).save(path, exif=exif, **options)
    with Image.open(path) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    apply = PixelRules(exif="apply")

    upright, header = decode(path, rules=apply), read_header(path, rules=apply)

    assert upright.tobytes() == expected.tobytes()
    assert (header.width, header.height) == upright.size
    stored, header = decode(path), read_header(path)
    assert (header.width, header.height) == stored.size
    if suffix == "tif":  # PIL turns it always
        assert stored.tobytes() == upright.tobytes()
        assert header.orientation == 1
    else:
        assert stored.size == size
        assert header.orientation == orientation
        assert header.turned == upright.size


@pytest.mark.parametrize("value", [0, 9, 255, None])
def test_an_invalid_orientation_is_none(value: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    if value is not None:
        exif[0x0112] = value
    photo().save(tmp_path / "a.jpg", exif=exif)

    assert read_header(tmp_path / "a.jpg", rules=PixelRules(exif="apply")).orientation == 1
    assert decode(tmp_path / "a.jpg", rules=PixelRules(exif="apply")).size == (64, 48)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("least", "most"), [(0, 65535), (0, 4095), (29000, 29399), (100, 101)])
def test_sixteen_bits_are_divided_or_stretched(
    least: int, most: int, suffix: str, tmp_path: Path
) -> None:
    values = np.linspace(least, most, 48 * 64).round().astype(np.uint16).reshape(48, 64)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(values).save(path)

    assert read_header(path).is_sixteen_bit
    assert (sixteen_bit_values(path.read_bytes(), path) == values).all()
    full = np.asarray(decode(path))
    assert (full == np.round(values / 257).astype(np.uint8)[..., None]).all()
    rules = PixelRules(sixteen_bit="stretch", sixteen_bit_range=(least, most))
    found = np.asarray(decode(path, rules=rules)).astype(int)
    exact = (values.astype(float) - least) / (most - least) * 255
    assert np.abs(found - exact[..., None]).max() <= 0.5
    assert len(np.unique(found)) == min(256, most - least + 1)


def test_values_outside_of_the_range_are_clipped_and_eight_bits_stay(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 100, 150, 200, 65535]], np.uint16)).save(tmp_path / "a.png")
    photo().save(tmp_path / "b.png")
    rules = PixelRules(sixteen_bit="stretch", sixteen_bit_range=(100, 200))

    assert np.asarray(decode(tmp_path / "a.png", rules=rules))[0, :, 0].tolist() == [
        0, 0, 128, 255, 255,
    ]  # fmt: skip
    assert decode(tmp_path / "b.png", rules=rules).tobytes() == photo().tobytes()
    assert not read_header(tmp_path / "b.png").is_sixteen_bit
    with pytest.raises(ImageError, match=r"a\.png: has 16 bits, and data\.sixteen_bit=stretch"):
        decode(tmp_path / "a.png", rules=PixelRules(sixteen_bit="stretch"))


@pytest.mark.parametrize(
    "values",
    [
        {"sixteen_bit_range": (1, 2)},
        {"sixteen_bit": "stretch", "sixteen_bit_range": (2, 2)},
        {"sixteen_bit": "stretch", "sixteen_bit_range": (-1, 2)},
        {"sixteen_bit": "stretch", "sixteen_bit_range": (0, 65536)},
    ],
)
def test_rules_that_make_no_sense_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sixteen_bit_range"):
        PixelRules(**values)
