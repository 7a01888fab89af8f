"""A data set packed into Parquet shards: fewer, larger files, on disk or in an object store.

    MANIFEST.json          what there is, with sizes and SHA-256; written last
    annotations.parquet    a row per image: its annotations, and where its bytes lie
    shard-00000.parquet    the images as they were on disk, each with its annotations
    shard-00001.parquet    …

Written by `jobs/pack.py`. A `ShardedDataset` is a `CocoDataset` in all: same samples, same order,
same fingerprint, same ground truth, so that a run may go on from either.

Any tool reads the shards as Parquet. This reader does not take that way: training wants single
images in random order, and Parquet hands out row groups, here 32 images for one. The images are
stored uncompressed, so each one lies in its shard in one piece, and `annotations.parquet` says
where. One image costs one read of its length, on disk or in a store.

Nothing altered gets into training. `annotations.parquet` is checked by its SHA-256 when the set is
opened, and the fingerprint by what it holds; every image by its CRC-32 at each read, which sees
every flipped bit and costs a hundredth of decoding. The SHA-256 of whole shards is for
`jobs/pack.py --verify`, and for `verify=True`.
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
from deta.platform.shards.arrow_tables import tables_of
from deta.platform.shards.manifest import (
    ANNOTATIONS,
    MANIFEST,
    REPAIR,
    Manifest,
    Shard,
    ShardError,
    check_sha256,
    check_size,
    missing,
    read_manifest,
    verify_shards,
)
from deta.platform.shards.object_store import Store

logger = logging.getLogger(__name__)

PLACE_ROW = np.dtype([("shard", "<i4"), ("offset", "<i8"), ("crc32", "<u4")])


class ShardedDataset(CocoDataset):
    """A `CocoDataset` whose images come from shards. Made by `ShardedDataset.open`.

    `record.path` is where an image would be if a shard were a folder.
    """

    store: Store
    shards: tuple[Shard, ...]
    _places: np.ndarray  # I rows of PLACE_ROW

    @classmethod
    def open(  # type: ignore[override]  # annotations come with the images
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
            location: folder or address that holds MANIFEST.json.
            lenient: leave out, with a note, images of more than `max_pixels`.
            max_pixels: the largest image to accept, width times height.
            verify: read all shards and compare their SHA-256; else their sizes alone, and each
                image when it is read.
            progress: show a bar on stderr while verifying.

        Raises:
            ShardError: a file is missing, cut or altered; names it.
            DatasetError: the store cannot be reached, or an image is too large.
        """
        store = Store(location)
        manifest = read_manifest(store)
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
                f"that of {ANNOTATIONS}, {dataset.fingerprint[:12]}; the files are of two packs, "
                "or of other rules for boxes: pack the data set again"
            )
        for note in dataset.notes:
            logger.warning(note)
        return dataset._without_giants(lenient)

    @classmethod
    def _from_table(cls, store: Store, manifest: Manifest, table: pa.Table) -> ShardedDataset:
        image_rows, annotation_rows = tables_of(table, manifest.categories)
        places = np.zeros(len(image_rows), PLACE_ROW)
        for name in PLACE_ROW.names or ():
            places[name] = table[name].to_numpy()
        return cls.of_tables(
            store,
            manifest.shards,
            places,
            table["file_name"].to_pylist(),
            image_rows,
            annotation_rows,
            manifest.categories,
            list(manifest.notes),
            MAX_PIXELS,
        )

    @classmethod
    def of_tables(
        cls,
        store: Store,
        shards: tuple[Shard, ...],
        places: np.ndarray,
        file_names: list[str],
        image_rows: np.ndarray,
        annotation_rows: np.ndarray,
        categories: tuple[Category, ...],
        notes: list[str],
        max_pixels: int,
    ) -> ShardedDataset:
        """The data set of tables that were checked before; `places` has I rows of PLACE_ROW."""
        dataset = cls(
            Path(store.shown),
            file_names,
            image_rows,
            annotation_rows,
            categories,
            notes,
            max_pixels,
        )
        dataset.store, dataset.shards, dataset._places = store, shards, places
        return dataset

    @property
    def places(self) -> np.ndarray:
        """Where each image lies, not to be written to: I rows of PLACE_ROW."""
        return self._places

    def content(self, index: int) -> bytes:
        """The file of image `index` as it was packed.

        Raises:
            ShardError: its shard is missing, cut or altered.
            OSError: the store failed.
        """
        index = range(len(self))[index]
        shard, offset, checksum = self._places[index].tolist()
        name = self.shards[shard].name
        length = int(self._image_rows["num_bytes"][index])
        try:
            content = self.store.read_at(name, offset, length)
        except FileNotFoundError:
            raise ShardError(missing(self.store, name)) from None
        if len(content) < length:
            raise ShardError(
                f"{self.store.name_of(name)}: ends at image {self._file_names[index]} and was cut "
                f"since it was opened; {REPAIR}"
            )
        if zlib.crc32(content) != checksum:
            raise ShardError(
                f"{self.store.name_of(name)}: the bytes of image {self._file_names[index]}, from "
                f"byte {offset}, are not those packed (CRC-32 differs); {REPAIR}"
            )
        return content

    def _with_images(
        self,
        chosen: list[int],
        image_rows: np.ndarray,
        annotation_rows: np.ndarray,
        notes: list[str],
    ) -> ShardedDataset:
        return ShardedDataset.of_tables(
            self.store,
            self.shards,
            self._places[chosen],
            [self._file_names[i] for i in chosen],
            image_rows,
            annotation_rows,
            self.categories,
            notes,
            self.max_pixels,
        )

    def _path(self, index: int) -> Path:
        shard = self.shards[self._places["shard"][index]].name
        return self.folder / shard / self._file_names[index]

    def _without_giants(self, lenient: bool) -> ShardedDataset:
        fits = self._image_rows["width"] * self._image_rows["height"] <= self.max_pixels
        if fits.all():
            return self
        name = self._file_names[int(np.argmin(fits))]
        note = f"{self.store.shown}: {(~fits).sum()} images, {name} the first, have more than "
        note += f"max_pixels={self.max_pixels:,} pixels"
        if not lenient or not fits.any():
            raise DatasetError(f"{note}; raise the limit, or pass data.lenient=true to skip them")
        self.notes.append(f"{note} and were skipped")
        kept = self.subset(np.flatnonzero(fits))
        assert isinstance(kept, ShardedDataset)
        return kept
