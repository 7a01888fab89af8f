"""Open a data set of loose files, or of shards that `jobs/pack.py` wrote."""

from __future__ import annotations

from pathlib import Path

from deta.platform.data.coco_annotations import DatasetError
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.image_decoding import AS_STORED, MAX_PIXELS
from deta.platform.data.image_sizes import PixelRules
from deta.platform.shards.manifest import FORMAT, MANIFEST, UNFINISHED
from deta.platform.shards.object_store import ObjectStore, is_address
from deta.platform.shards.sharded_dataset import ShardedDataset


def open_dataset(
    images: str | Path,
    annotations: str | Path = "",
    *,
    lenient: bool = False,
    max_pixels: int = MAX_PIXELS,
    rules: PixelRules = AS_STORED,
    verify: bool = False,
    progress: bool = False,
) -> CocoDataset:
    """Check a data set and open it.

    Args:
        images: folder of image files; or folder or address (s3://bucket/folder) of shards.
        annotations: JSON in COCO format; empty for shards, which contain their annotations.
        lenient: skip records that can be skipped, and count them in `notes`.
        max_pixels: the largest image to accept, width times height.
        rules: how pixels are read.
        verify: read all shards first and compare their SHA-256.
        progress: show a bar on stderr if a step takes long.

    Raises:
        DatasetError: names the file with record and field, or the shard.
    """
    if is_address(images) or _holds_shards(Path(images)):
        if str(annotations):
            raise DatasetError(
                f"{ObjectStore(images).shown}: is a data set of shards, which contain their "
                f"annotations, so {annotations} would not be read; leave the annotations empty"
            )
        return ShardedDataset.open_shards(
            images,
            lenient=lenient,
            max_pixels=max_pixels,
            rules=rules,
            verify=verify,
            progress=progress,
        )
    if not str(annotations):
        raise DatasetError(
            f"{images}: has no annotations; give the COCO file, or a folder or address of shards "
            f"written by jobs/pack.py (there is no {MANIFEST})"
        )
    folder, file = Path(images), Path(annotations)
    return CocoDataset.open(
        folder, file, lenient=lenient, max_pixels=max_pixels, rules=rules, progress=progress
    )


def _holds_shards(folder: Path) -> bool:
    """Return True for a local folder that `jobs/pack.py` wrote, completely or not."""
    manifests = [folder / name for name in (MANIFEST, UNFINISHED)]
    return any(folder.glob("shard-*.parquet")) or any(
        FORMAT.encode() in path.read_bytes()[:100] for path in manifests if path.is_file()
    )
