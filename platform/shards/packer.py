"""A data set of loose files to Parquet shards; see `shards.py` for what they are.

The plan, which images go into which shard, follows from the files' lengths. A shard appears whole,
with its checksum noted in PACKING.json, so a pack that was killed goes on behind its last whole
shard, once these are found as they were written. MANIFEST.json comes last.
"""

from __future__ import annotations

import hashlib
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from deta.platform.data.coco_annotations import NUM_SHOWN, DatasetError
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.image_decoding import ImageError
from deta.platform.data.image_folder import NUM_READERS
from deta.platform.shards.arrow_tables import ANNOTATION_FIELDS, table_of
from deta.platform.shards.manifest import (
    ANNOTATIONS,
    MANIFEST,
    UNFINISHED,
    Manifest,
    Shard,
    check_size,
    read_manifest,
)
from deta.platform.shards.object_store import Store

ROW_GROUP_IMAGES = 32  # for other readers of Parquet; ours reads single images
ROW_GROUP_BYTES = 64 << 20
MEGABYTE = 1 << 20

PLACE_FIELDS = [
    pa.field("shard", pa.int32(), nullable=False),
    pa.field("offset", pa.int64(), nullable=False),
    pa.field("crc32", pa.uint32(), nullable=False),
]
SHARD_SCHEMA = pa.schema([pa.field("image", pa.binary(), nullable=False), *ANNOTATION_FIELDS])


class Place(NamedTuple):
    """Where an image lies in its shard."""

    offset: int
    crc32: int


@dataclass(frozen=True)
class Packed:
    """What a call did."""

    manifest: Manifest
    num_found: int  # shards that an earlier call had finished


def pack(
    dataset: CocoDataset,
    store: Store,
    *,
    shard_bytes: int,
    decode: bool = False,
    lenient: bool = False,
    progress: bool = False,
) -> Packed:
    """Write a data set as shards, or finish what an earlier call began.

    Args:
        shard_bytes: images are added to a shard until it holds as much; it is built in memory.
        decode: decode every picture first.
        lenient: leave out those that do not decode; else they are an error.
        progress: show bars on stderr.

    Raises:
        DatasetError: the folder holds something else, or pictures that do not decode.
        ImageError: an image changed since the data set was opened.
        OSError: the storage failed; the same call goes on.
    """
    if decode:
        dataset = _decodable(dataset, lenient, progress)
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
    begun = _begun(store, empty)
    if begun.annotations is not None:
        return Packed(begun, len(begun.shards))

    earlier = {shard.name: shard for shard in begun.shards}
    shards: list[Shard] = []
    tables: list[pa.Table] = []
    num_found = 0
    with tqdm(
        total=int(dataset.num_bytes.sum()),
        unit="B",
        unit_scale=True,
        disable=not progress,
        file=sys.stderr,
    ) as bar:
        for number, images in enumerate(plan):
            name = f"shard-{number:05d}.parquet"
            bar.set_description(f"{name} of {len(plan)}")
            content = _written(store, earlier.get(name))
            if content is not None:
                shards.append(earlier[name])
                num_found += 1
            else:
                content = _shard(dataset, images)
                sha256 = hashlib.sha256(content).hexdigest()
                store.write(name, content)
                shards.append(Shard(name, len(images), len(content), sha256))
                store.write(UNFINISHED, replace(empty, shards=tuple(shards)).to_json())
            tables.append(_with_places(table_of(dataset, images), number, places_in(content)))
            bar.update(int(dataset.num_bytes[images.start : images.stop].sum()))

    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(tables), sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    sha256 = hashlib.sha256(content).hexdigest()
    store.write(ANNOTATIONS, content)
    index = Shard(ANNOTATIONS, len(dataset), len(content), sha256)
    manifest = replace(empty, annotations=index, shards=tuple(shards))
    store.write(MANIFEST, manifest.to_json())
    store.delete(UNFINISHED)
    return Packed(manifest, num_found)


def consecutive(num_bytes: np.ndarray, max_bytes: int, max_images: int) -> list[range]:
    """Images cut into consecutive ranges: as many as fit, and one at least."""
    ranges, start, held = [], 0, 0
    for index, length in enumerate(num_bytes.tolist()):
        if index > start and (held + length > max_bytes or index - start == max_images):
            ranges.append(range(start, index))
            start, held = index, 0
        held += length
    ranges.append(range(start, len(num_bytes)))
    return ranges


def places_in(shard: bytes) -> list[Place]:
    """Where the images lie in a shard, in their order. Reads it back as Parquet does."""
    places: list[Place] = []
    end = 0
    file = pq.ParquetFile(pa.BufferReader(shard), page_checksum_verification=True)
    for batch in file.iter_batches(ROW_GROUP_IMAGES, columns=["image"]):
        for value in batch.column(0):
            image = value.as_py()
            # Parquet's plain encoding: the length, then the bytes. Between two images there is
            # nothing, or the header of a page.
            # Source: https://parquet.apache.org/docs/file-format/data-pages/encodings/
            length = struct.pack("<I", len(image))
            found = shard.find(length + image, end)
            if found < 0:
                raise RuntimeError("an image is not stored in one piece; was the shard compressed?")
            places.append(Place(found + len(length), zlib.crc32(image)))
            end = found + len(length) + len(image)
    return places


def _begun(store: Store, empty: Manifest) -> Manifest:
    """What earlier calls wrote of this very pack; `empty` where there is none."""
    sizes = store.sizes()
    if MANIFEST in sizes:
        manifest = read_manifest(store)
        if manifest.fingerprint != empty.fingerprint:
            raise DatasetError(
                f"{store.shown}: holds another data set (fingerprint {manifest.fingerprint[:12]}, "
                f"this one {empty.fingerprint[:12]}); choose another output"
            )
        for file in (manifest.annotations, *manifest.shards):
            assert file is not None
            check_size(store, file, sizes)
        return manifest
    if UNFINISHED not in sizes:
        foreign = [name for name in sizes if not name.startswith(".")]
        if foreign:
            raise DatasetError(
                f"{store.shown}: is not empty, and holds no pack that could go on "
                f"({foreign[0]}); choose another output"
            )
        store.write(UNFINISHED, empty.to_json())
        return empty
    begun = Manifest.from_json(store.read(UNFINISHED), store.name_of(UNFINISHED))
    if replace(begun, shards=(), notes=()) != replace(empty, notes=()):
        raise DatasetError(
            f"{store.shown}: holds the beginning of a pack of another data set, or of other "
            "--shard-mb; delete it, or choose another output"
        )
    for name in sizes:  # left by a call that was killed
        if name.startswith(".") and name.endswith(".tmp"):
            store.delete(name)
    return begun


def _written(store: Store, shard: Shard | None) -> bytes | None:
    """The content of a shard that an earlier call finished, if it is still what was written."""
    if shard is None:
        return None
    try:
        content = store.read(shard.name)
    except FileNotFoundError:
        return None
    return content if hashlib.sha256(content).hexdigest() == shard.sha256 else None


def _shard(dataset: CocoDataset, images: range) -> bytes:
    """Some images with their annotations as a Parquet file."""
    sink = pa.BufferOutputStream()
    writer = pq.ParquetWriter(
        sink,
        SHARD_SCHEMA,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    lengths = dataset.num_bytes
    with writer, ThreadPoolExecutor(NUM_READERS) as pool:
        own = lengths[images.start : images.stop]
        for part in consecutive(own, ROW_GROUP_BYTES, ROW_GROUP_IMAGES):
            group = images[part.start : part.stop]
            contents = list(pool.map(dataset.content, group))
            for index, image in zip(group, contents, strict=True):
                if len(image) != lengths[index]:
                    raise ImageError(
                        f"{dataset.records[index].path}: has {len(image):,} bytes, and had "
                        f"{lengths[index]:,} when the data set was opened; pack again when "
                        "nothing writes to it"
                    )
            column = pa.array(contents, pa.binary())
            table = table_of(dataset, group).add_column(0, SHARD_SCHEMA.field(0), column)
            writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _with_places(table: pa.Table, shard: int, places: list[Place]) -> pa.Table:
    columns = [
        pa.array([shard] * len(places), pa.int32()),
        pa.array([place.offset for place in places], pa.int64()),
        pa.array([place.crc32 for place in places], pa.uint32()),
    ]
    for field, column in zip(PLACE_FIELDS, columns, strict=True):
        table = table.append_column(field, column)
    return table


def _decodable(dataset: CocoDataset, lenient: bool, progress: bool) -> CocoDataset:
    """The data set, without what does not decode if that may be left out."""

    def fault(index: int) -> str | None:
        try:
            dataset[index]
        except ImageError as error:
            return f"image {dataset.records[index].image_id}, file_name: {error}"
        return None

    with ThreadPoolExecutor(NUM_READERS) as pool:
        found = tqdm(
            pool.map(fault, range(len(dataset))),
            "decoding",
            total=len(dataset),
            unit=" images",
            disable=not progress,
            file=sys.stderr,
        )
        faults = {index: text for index, text in enumerate(found) if text is not None}
    if not faults:
        return dataset
    lines = list(faults.values())[:NUM_SHOWN]
    if len(faults) > NUM_SHOWN:
        lines.append(f"... and {len(faults) - NUM_SHOWN} more")
    if not lenient or len(faults) == len(dataset):
        raise DatasetError(
            f"{dataset.folder}: {len(faults)} pictures do not decode; repair them, or give "
            "--lenient to leave them out:\n  " + "\n  ".join(lines)
        )
    kept = dataset.subset(index for index in range(len(dataset)) if index not in faults)
    kept.notes.append(f"left out: {len(faults)} pictures that do not decode; first: {lines[0]}")
    return kept
