"""A data set packed into Parquet shards: fewer, larger files, on disk or in an object store.

    MANIFEST.json          list of all files with sizes and SHA-256; written last
    annotations.parquet    a row per image: its annotations and its location in a shard
    shard-00000.parquet    the unchanged image files, each with its annotations
    shard-00001.parquet    …

`jobs/pack.py` writes them. A `ShardedDataset` equals the `CocoDataset` of the loose files: same
samples, order, fingerprint and ground truth, so a run can resume with either.

Any tool can read the shards as Parquet. This reader does not: training reads single images in
random order, but Parquet returns row groups, here of 32 images. The images are stored uncompressed,
so each one is contiguous in its shard, and `annotations.parquet` has its location. One image costs
one read of its size, on disk or in an object store.

No altered data reaches training. Opening checks the SHA-256 of `annotations.parquet`, and the
fingerprint of its content. Each read checks the CRC-32 of the image, which detects every flipped
bit and costs a hundredth of decoding. `jobs/pack.py --verify` and `verify=True` check the SHA-256
of complete shards.
"""

# I images   A annotations of all images

from __future__ import annotations

import logging
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deta.platform.data.coco_annotations import DatasetError
from deta.platform.data.coco_dataset import Category, CocoDataset
from deta.platform.data.image_decoding import MAX_PIXELS
from deta.platform.shards.arrow_tables import from_arrow
from deta.platform.shards.manifest import (
    ANNOTATIONS,
    MANIFEST,
    REPAIR,
    Manifest,
    Shard,
    ShardError,
    check_sha256,
    check_size,
    missing_message,
    read_pack_manifest,
    verify_shards,
)
from deta.platform.shards.object_store import ObjectStore

logger = logging.getLogger(__name__)

LOCATION_ROW = np.dtype([("shard", "<i4"), ("offset", "<i8"), ("crc32", "<u4")])


class ShardedDataset(CocoDataset):
    """A `CocoDataset` that reads images from shards. Made by `ShardedDataset.open_shards`.

    `record.path` is the path that an image would have if its shard were a folder.
    """

    store: ObjectStore
    shards: tuple[Shard, ...]
    _locations: np.ndarray  # I rows of LOCATION_ROW

    @classmethod
    def open_shards(
        cls,
        location: str | Path,
        *,
        lenient: bool = False,
        max_pixels: int = MAX_PIXELS,
        verify: bool = False,
        progress: bool = False,
    ) -> ShardedDataset:
        """Check a packed data set and open it.

        Args:
            location: folder or address of MANIFEST.json.
            lenient: skip images of more than `max_pixels`, and add a note.
            max_pixels: the largest image to accept, width times height.
            verify: read all shards and compare their SHA-256. Otherwise only sizes are compared,
                and each image is checked when it is read.
            progress: show a bar on stderr while verifying.

        Raises:
            ShardError: a file is missing, truncated or altered; names it.
            DatasetError: the store cannot be reached, or an image is too large.
        """
        store = ObjectStore(location)
        manifest = read_pack_manifest(store)
        sizes = store.sizes()
        files = [manifest.annotations, *manifest.shards] if manifest.annotations else []
        for file in files:
            check_size(store, file, sizes)
        assert manifest.annotations is not None
        content = store.read(manifest.annotations.name)
        check_sha256(store, manifest.annotations, content)
        if verify:
            verify_shards(store, manifest, progress)
        dataset = cls._from_table(store, manifest, pq.read_table(pa.BufferReader(content)))
        dataset.max_pixels = max_pixels
        if len(dataset) != manifest.num_images or dataset.fingerprint != manifest.fingerprint:
            raise ShardError(
                f"{store.name_of(MANIFEST)}: its fingerprint {manifest.fingerprint[:12]} is not "
                f"that of {ANNOTATIONS}, {dataset.fingerprint[:12]}; the files are from two packs, "
                "or from a version with other rules for boxes: pack the data set again"
            )
        for note in dataset.notes:
            logger.warning(note)
        return dataset._without_oversized(lenient)

    @classmethod
    def _from_table(cls, store: ObjectStore, manifest: Manifest, table: pa.Table) -> ShardedDataset:
        image_rows, annotation_rows = from_arrow(table, manifest.categories)
        locations = np.zeros(len(image_rows), LOCATION_ROW)
        for name in LOCATION_ROW.names or ():
            locations[name] = table[name].to_numpy()
        return cls.from_tables(
            store,
            manifest.shards,
            locations,
            table["file_name"].to_pylist(),
            image_rows,
            annotation_rows,
            manifest.categories,
            list(manifest.notes),
            MAX_PIXELS,
        )

    @classmethod
    def from_tables(
        cls,
        store: ObjectStore,
        shards: tuple[Shard, ...],
        locations: np.ndarray,
        file_names: list[str],
        image_rows: np.ndarray,
        annotation_rows: np.ndarray,
        categories: tuple[Category, ...],
        notes: list[str],
        max_pixels: int,
    ) -> ShardedDataset:
        """Wrap tables that were checked before; `locations` has I rows of LOCATION_ROW."""
        dataset = cls(
            Path(store.shown),
            file_names,
            image_rows,
            annotation_rows,
            categories,
            notes,
            max_pixels,
        )
        dataset.store, dataset.shards, dataset._locations = store, shards, locations
        return dataset

    @property
    def locations(self) -> np.ndarray:
        """The location of each image, I rows of LOCATION_ROW; do not modify."""
        return self._locations

    def content(self, index: int) -> bytes:
        """Return the packed bytes of image `index`.

        Raises:
            ShardError: its shard is missing, truncated or altered.
            OSError: the storage failed.
        """
        index = range(len(self))[index]
        shard, offset, checksum = self._locations[index].tolist()
        name = self.shards[shard].name
        length = int(self._image_rows["num_bytes"][index])
        try:
            content = self.store.read_at(name, offset, length)
        except FileNotFoundError:
            raise ShardError(missing_message(self.store, name)) from None
        if len(content) < length:
            raise ShardError(
                f"{self.store.name_of(name)}: ends at image {self._file_names[index]}, so it was "
                f"cut since it was opened; {REPAIR}"
            )
        if zlib.crc32(content) != checksum:
            raise ShardError(
                f"{self.store.name_of(name)}: the bytes of image {self._file_names[index]}, from "
                f"byte {offset}, are not the packed ones (CRC-32 differs); {REPAIR}"
            )
        return content

    def _with_images(
        self,
        chosen: list[int],
        image_rows: np.ndarray,
        annotation_rows: np.ndarray,
        notes: list[str],
    ) -> ShardedDataset:
        return ShardedDataset.from_tables(
            self.store,
            self.shards,
            self._locations[chosen],
            [self._file_names[i] for i in chosen],
            image_rows,
            annotation_rows,
            self.categories,
            notes,
            self.max_pixels,
        )

    def _path(self, index: int) -> Path:
        shard = self.shards[self._locations["shard"][index]].name
        return self.folder / shard / self._file_names[index]

    def _without_oversized(self, lenient: bool) -> ShardedDataset:
        fits = self._image_rows["width"] * self._image_rows["height"] <= self.max_pixels
        if fits.all():
            return self
        name = self._file_names[int(np.argmin(fits))]
        note = (
            f"{self.store.shown}: {(~fits).sum()} images, the first of them {name}, have more than "
        )
        note += f"max_pixels={self.max_pixels:,} pixels"
        if not lenient or not fits.any():
            raise DatasetError(f"{note}; raise the limit, or pass data.lenient=true to skip them")
        self.notes.append(f"{note} and were skipped")
        smaller = self.subset(np.flatnonzero(fits))
        assert isinstance(smaller, ShardedDataset)
        return smaller
