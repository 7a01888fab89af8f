"""Pack a data set of loose files into Parquet shards; `sharded_dataset.py` describes the format.

The file sizes determine which images go into which shard. Each shard is written atomically, and
then its checksum goes into PACKING.json. So an interrupted pack resumes after its last complete
shard, once the checksums of the earlier ones match. MANIFEST.json is written last.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deta.platform.data.coco_annotations import DatasetError, Problems
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.image_decoding import ImageError
from deta.platform.data.image_folder import NUM_READERS
from deta.platform.shards.arrow_tables import ANNOTATION_FIELDS, to_arrow
from deta.platform.shards.manifest import (
    ANNOTATIONS,
    MANIFEST,
    UNFINISHED,
    Manifest,
    Shard,
    ShardError,
    check_sizes,
    read_pack_manifest,
    read_packed,
)
from deta.platform.shards.object_store import ObjectStore
from deta.platform.shards.sharded_dataset import LOCATION_ROW
from deta.platform.system.atomic_write import LEFTOVER_SUFFIX
from deta.platform.system.progress import progress_bar

ROW_GROUP_IMAGES = 32  # for other Parquet readers; ours reads single images
ROW_GROUP_BYTES = 64 << 20
MEGABYTE = 1 << 20

LOCATION_FIELDS = [
    pa.field(name, pa.from_numpy_dtype(LOCATION_ROW[name]), nullable=False)
    for name in LOCATION_ROW.names or ()
]
SHARD_SCHEMA = pa.schema([pa.field("image", pa.binary(), nullable=False), *ANNOTATION_FIELDS])


class PackedDataset(NamedTuple):
    """The result of `pack_dataset`."""

    manifest: Manifest
    num_reused: int  # shards that an earlier call had finished


def pack_dataset(
    dataset: CocoDataset,
    store: ObjectStore,
    *,
    shard_bytes: int,
    decode: bool = False,
    lenient: bool = False,
    progress: bool = False,
) -> PackedDataset:
    """Write a data set as shards, or finish an interrupted pack.

    Args:
        shard_bytes: images are added to a shard up to this size; it is built in memory.
        decode: decode every image first.
        lenient: leave out images that do not decode; otherwise they are an error.
        progress: show bars on stderr.

    Raises:
        DatasetError: the folder contains something else, or images do not decode.
        ImageError: an image changed since the data set was opened.
        OSError: the storage failed; the same call resumes the pack.
    """
    if decode:
        dataset = _only_decodable(dataset, lenient, progress)
    plan = consecutive(dataset.num_bytes, shard_bytes, len(dataset))
    empty = Manifest(
        fingerprint=dataset.fingerprint,
        num_images=len(dataset),
        shard_bytes=shard_bytes,
        categories=dataset.categories,
        notes=tuple(note.replace(f"{dataset.folder}/", "") for note in dataset.notes),
        annotations=None,
        shards=(),
    )
    resumed = _resume_manifest(store, empty)
    if resumed.annotations is not None:
        return PackedDataset(resumed, len(resumed.shards))

    earlier = {shard.name: shard for shard in resumed.shards}
    shards: list[Shard] = []
    tables: list[pa.Table] = []
    num_reused = 0
    total = int(dataset.num_bytes.sum())
    with progress_bar("packing", total, is_bytes=True, show=progress) as advance:
        for number, images in enumerate(plan):
            name = f"shard-{number:05d}.parquet"
            content = _finished(store, earlier.get(name))
            if content is not None:
                shards.append(earlier[name])
                num_reused += 1
            else:
                content = _encode_shard(dataset, images)
                shards.append(_write_file(store, name, len(images), content))
                store.write(UNFINISHED, replace(empty, shards=tuple(shards)).to_json())
            table, locations = to_arrow(dataset, images), locate_images(content)
            columns = ([number] * len(images), *zip(*locations, strict=True))
            for field, column in zip(LOCATION_FIELDS, columns, strict=True):
                table = table.append_column(field, pa.array(column, field.type))
            tables.append(table)
            advance(int(dataset.num_bytes[images.start : images.stop].sum()))

    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(tables), sink, compression="zstd")
    annotations = _write_file(store, ANNOTATIONS, len(dataset), sink.getvalue().to_pybytes())
    manifest = replace(empty, annotations=annotations, shards=tuple(shards))
    store.write(MANIFEST, manifest.to_json())
    store.delete(UNFINISHED)
    return PackedDataset(manifest, num_reused)


def consecutive(num_bytes: np.ndarray, max_bytes: int, max_images: int) -> list[range]:
    """Cut images into consecutive ranges, each with as many images as fit, at least one."""
    ranges, start, size = [], 0, 0
    for index, length in enumerate(num_bytes.tolist()):
        if index > start and (size + length > max_bytes or index - start == max_images):
            ranges.append(range(start, index))
            start, size = index, 0
        size += length
    ranges.append(range(start, len(num_bytes)))
    return ranges


def locate_images(shard: bytes) -> list[tuple[int, int]]:
    """Return offset and CRC-32 of each image in a shard, in order, by reading it as Parquet."""
    locations: list[tuple[int, int]] = []
    end = 0
    file = pq.ParquetFile(pa.BufferReader(shard), page_checksum_verification=True)
    for batch in file.iter_batches(ROW_GROUP_IMAGES, columns=["image"]):
        for value in batch.column(0):
            image = value.as_py()
            # Parquet's plain encoding is the length, then the bytes. Between two images there is
            # nothing or a page header.
            # Source: https://parquet.apache.org/docs/file-format/data-pages/encodings/
            length = struct.pack("<I", len(image))
            found = shard.find(length + image, end)
            if found < 0:
                raise RuntimeError("an image is not stored contiguously; was the shard compressed?")
            locations.append((found + len(length), zlib.crc32(image)))
            end = found + len(length) + len(image)
    return locations


def _resume_manifest(store: ObjectStore, empty: Manifest) -> Manifest:
    """Return the manifest that earlier calls wrote of this pack, or `empty` if there is none."""
    sizes = store.sizes()
    if MANIFEST in sizes:
        manifest = read_pack_manifest(store)
        if manifest.fingerprint != empty.fingerprint:
            raise DatasetError(
                f"{store.shown}: contains another data set (fingerprint "
                f"{manifest.fingerprint[:12]}, this one {empty.fingerprint[:12]}); "
                "choose another output"
            )
        check_sizes(store, manifest)
        return manifest
    if UNFINISHED not in sizes:
        if unknown := [name for name in sizes if not name.startswith(".")]:
            raise DatasetError(
                f"{store.shown}: is not empty and contains no pack to resume "
                f"({unknown[0]}); choose another output"
            )
        store.write(UNFINISHED, empty.to_json())
        return empty
    resumed = Manifest.from_json(store.read(UNFINISHED), store.name_of(UNFINISHED))
    if replace(resumed, shards=(), notes=()) != replace(empty, notes=()):
        raise DatasetError(
            f"{store.shown}: contains an incomplete pack of another data set, or with another "
            "--shard-mb; delete it, or choose another output"
        )
    for name in sizes:  # left over from a killed call
        if name.startswith(".") and name.endswith(LEFTOVER_SUFFIX):
            store.delete(name)
    return resumed


def _finished(store: ObjectStore, shard: Shard | None) -> bytes | None:
    """Return the content of a shard that an earlier call finished, or None if it is not intact."""
    try:
        return None if shard is None else read_packed(store, shard)
    except ShardError:
        return None


def _encode_shard(dataset: CocoDataset, images: range) -> bytes:
    """Encode some images and their annotations as a Parquet file."""
    sink = pa.BufferOutputStream()
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    lengths = dataset.num_bytes
    with (
        pq.ParquetWriter(sink, SHARD_SCHEMA, write_page_checksum=True, **options) as writer,
        ThreadPoolExecutor(NUM_READERS) as pool,
    ):
        own = lengths[images.start : images.stop]
        for part in consecutive(own, ROW_GROUP_BYTES, ROW_GROUP_IMAGES):
            group = images[part.start : part.stop]
            contents = list(pool.map(dataset.content, group))
            for index, image in zip(group, contents, strict=True):
                if len(image) != lengths[index]:
                    raise ImageError(
                        f"{dataset.records[index].path}: has {len(image):,} bytes, but had "
                        f"{lengths[index]:,} when the data set was opened; pack again when "
                        "no other process writes to it"
                    )
            column = pa.array(contents, pa.binary())
            writer.write_table(
                to_arrow(dataset, group).add_column(0, SHARD_SCHEMA.field(0), column)
            )
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _write_file(store: ObjectStore, name: str, num_images: int, content: bytes) -> Shard:
    store.write(name, content)
    return Shard(name, num_images, len(content), hashlib.sha256(content).hexdigest())


def _only_decodable(dataset: CocoDataset, lenient: bool, progress: bool) -> CocoDataset:
    """Return the data set without images that do not decode; raise unless `lenient`."""

    def fault(index: int) -> str | None:
        try:
            dataset[index]
        except ImageError as error:
            return f"image {dataset.records[index].image_id}, file_name: {error}"
        return None

    problems = Problems(Path(dataset.folder.name))
    good = []
    with (
        ThreadPoolExecutor(NUM_READERS) as pool,
        progress_bar("decoding", len(dataset), show=progress) as advance,
    ):
        for index, text in enumerate(pool.map(fault, range(len(dataset)))):
            if text is None:
                good.append(index)
            else:
                image_id = dataset.records[index].image_id
                problems.add_skippable("image does not decode", image_id, text)
            advance(1)
    problems.raise_errors(lenient and bool(good))
    if len(good) < len(dataset):
        dataset = dataset.subset(good)
        dataset.notes += problems.notes()
    return dataset
