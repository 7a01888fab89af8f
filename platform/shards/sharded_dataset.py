"""A data set packed into Parquet shards: fewer, larger files, on disk or in an object store.

    MANIFEST.json          list of all files with sizes and SHA-256; written last
    annotations.parquet    a row per image: its annotations and its location in a shard
    shard-00000.parquet    the unchanged image files, each with its annotations
    shard-00001.parquet    …

`jobs/pack.py` writes them. A `ShardedDataset` equals the `CocoDataset` of the loose files: same
samples, order, fingerprint and ground truth, so a run can resume with either.

Any tool can read the shards as Parquet. Training reads single images in random order, but Parquet
returns row groups, here of 32 images. So images are stored uncompressed, each contiguous in its
shard, and `annotations.parquet` has its location: one image costs one read of its size.

No altered data reaches training. Opening checks the SHA-256 of `annotations.parquet` and the
fingerprint of its content. Each read checks the image's CRC-32, which costs a hundredth of
decoding. `jobs/pack.py --verify` and `verify=True` check the SHA-256 of complete shards.
"""

# I images   A annotations of all images

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deta.platform.data.coco_annotations import DatasetError
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.image_decoding import AS_STORED, MAX_PIXELS
from deta.platform.data.image_sizes import PixelRules
from deta.platform.shards.arrow_tables import from_arrow
from deta.platform.shards.manifest import (
    ANNOTATIONS,
    MANIFEST,
    REPAIR,
    Shard,
    ShardError,
    check_sizes,
    read_pack_manifest,
    read_packed,
    verify_shards,
)
from deta.platform.shards.object_store import ObjectStore

logger = logging.getLogger(__name__)

LOCATION_ROW = np.dtype([("shard", "<i4"), ("offset", "<i8"), ("crc32", "<u4")])


class ShardedDataset(CocoDataset):
    """A `CocoDataset` that reads images from shards. Made by `ShardedDataset.open_shards`.

    `record.path` is the path that an image would have if its shard were a folder.
    """

    def __init__(
        self, store: ObjectStore, shards: tuple[Shard, ...], locations: np.ndarray, *others: Any
    ) -> None:
        """Wrap checked tables: `locations` has I rows of LOCATION_ROW, `others` the arguments of
        `CocoDataset` after the folder.
        """
        super().__init__(Path(store.shown), *others)
        self.store, self.shards, self.locations = store, shards, locations

    @classmethod
    def open_shards(
        cls,
        location: str | Path,
        *,
        lenient: bool = False,
        max_pixels: int = MAX_PIXELS,
        rules: PixelRules = AS_STORED,
        verify: bool = False,
        progress: bool = False,
    ) -> ShardedDataset:
        """Check a packed data set and open it.

        Args: as for `open_dataset`; `location` is the folder or address of MANIFEST.json. Without
        `verify` only sizes are compared, and each image is checked when it is read.

        Raises:
            ShardError: a file is missing, truncated or altered; names it.
            DatasetError: the store cannot be reached, or an image is too large.
        """
        store = ObjectStore(location)
        manifest = read_pack_manifest(store)
        check_sizes(store, manifest)
        if verify:
            verify_shards(store, manifest, progress)
        assert manifest.annotations is not None  # the manifest is complete
        table = pq.read_table(pa.BufferReader(read_packed(store, manifest.annotations)))
        tables = from_arrow(table, manifest.categories)
        locations = np.zeros(len(table), LOCATION_ROW)
        for name in LOCATION_ROW.names or ():
            locations[name] = table[name].to_numpy()
        notes = list(manifest.notes)
        dataset = cls(
            store, manifest.shards, locations, tables, manifest.categories, notes, max_pixels, rules
        )
        if len(dataset) != manifest.num_images or dataset.fingerprint != manifest.fingerprint:
            raise ShardError(
                f"{store.name_of(MANIFEST)}: its fingerprint {manifest.fingerprint[:12]} is not "
                f"that of {ANNOTATIONS}, {dataset.fingerprint[:12]}; the files are from two packs, "
                "or from a version with other rules for boxes: pack the data set again"
            )
        for note in dataset.notes:
            logger.warning(note)
        return dataset._without_oversized(lenient)

    def content(self, index: int) -> bytes:
        """Return the packed bytes of image `index`.

        Raises:
            ShardError: its shard is missing, truncated or altered.
            OSError: the storage failed.
        """
        index = range(len(self))[index]
        shard, offset, checksum = self.locations[index].tolist()
        length = int(self.tables.images["num_bytes"][index])
        name = self.store.name_of(self.shards[shard].name)
        try:
            content = self.store.read_at(self.shards[shard].name, offset, length)
        except FileNotFoundError:
            raise ShardError(f"{name}: is missing; {REPAIR}") from None
        if zlib.crc32(content) != checksum:
            raise ShardError(
                f"{name}: the bytes of image {self.tables.file_names[index]}, from byte {offset}, "
                f"are not the packed ones (cut, or the CRC-32 differs); {REPAIR}"
            )
        return content

    def beginning(self, index: int, num_bytes: int) -> bytes:
        shard, offset, _ = self.locations[index].tolist()
        length = min(num_bytes, int(self.tables.images["num_bytes"][index]))
        return self.store.read_at(self.shards[shard].name, offset, length)

    def subset(self, indices: Iterable[int]) -> Self:
        chosen = sorted(indices)
        part = super().subset(chosen)
        part.locations = self.locations[chosen]
        return part

    def _path(self, index: int) -> Path:
        shard = self.shards[self.locations["shard"][index]].name
        return self.folder / shard / self.tables.file_names[index]

    def _without_oversized(self, lenient: bool) -> Self:
        fits = self.tables.images["width"] * self.tables.images["height"] <= self.max_pixels
        if fits.all():
            return self
        note = (
            f"{self.store.shown}: {(~fits).sum()} images, the first of them "
            f"{self.tables.file_names[int(np.argmin(fits))]}, have more than "
            f"max_pixels={self.max_pixels:,} pixels"
        )
        if not lenient or not fits.any():
            raise DatasetError(f"{note}; raise the limit, or pass data.lenient=true to skip them")
        self.notes.append(f"{note} and were skipped")
        return self.subset(np.flatnonzero(fits).tolist())
