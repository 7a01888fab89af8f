"""A data set by where it is: loose files, or shards of `jobs/pack.py`."""

from __future__ import annotations

import json
from pathlib import Path

from deta.platform.data.coco_annotations import DatasetError
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.image_decoding import MAX_PIXELS
from deta.platform.shards.manifest import FORMAT, MANIFEST, UNFINISHED
from deta.platform.shards.object_store import Store, is_address
from deta.platform.shards.sharded_dataset import ShardedDataset


def open_dataset(
    images: str | Path,
    annotations: str | Path = "",
    *,
    lenient: bool = False,
    max_pixels: int = MAX_PIXELS,
    verify: bool = False,
    progress: bool = False,
) -> CocoDataset:
    """Check a data set and open it.

    Args:
        images: folder of image files; or folder or address (s3://bucket/folder) of shards.
        annotations: JSON in COCO's format; empty for shards, which hold their annotations.
        lenient: skip, counted in `notes`, what can be skipped.
        max_pixels: the largest image to accept, width times height.
        verify: of shards, read all and compare their SHA-256 first.
        progress: show a bar on stderr for what takes long.

    Raises:
        DatasetError: names the file, and the record and field, or the shard.
    """
    if is_address(images) or _holds_shards(Path(images)):
        if str(annotations):
            raise DatasetError(
                f"{Store(images).shown}: is a data set of shards, which hold their annotations, "
                f"and the file {annotations} would not be read; leave the annotations empty"
            )
        return ShardedDataset.open(
            images, lenient=lenient, max_pixels=max_pixels, verify=verify, progress=progress
        )
    if not str(annotations):
        raise DatasetError(
            f"{images}: has no annotations; give the COCO file, or a folder or address of shards "
            f"written by jobs/pack.py ({MANIFEST} is not here)"
        )
    return CocoDataset.open(
        Path(images),
        Path(annotations),
        lenient=lenient,
        max_pixels=max_pixels,
        progress=progress,
    )


def _holds_shards(folder: Path) -> bool:
    """Whether a local folder was written by `jobs/pack.py`, to its end or not."""
    for name in (MANIFEST, UNFINISHED):
        try:
            content = json.loads((folder / name).read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError):  # an image folder may hold such a file; a broken one of ours
            return any(folder.glob("shard-*.parquet"))  # is told of when it is opened
        return isinstance(content, dict) and content.get("format") == FORMAT
    return any(folder.glob("shard-*.parquet"))
