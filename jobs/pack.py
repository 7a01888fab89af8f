#!/usr/bin/env python
"""Pack a data set into Parquet shards, for slow disks, shared storage and object stores.

  python jobs/pack.py --images train2017 --annotations instances_train2017.json \\
      --out /data/coco-train
  python jobs/pack.py … --out s3://bucket/coco-train
  python jobs/pack.py --verify s3://bucket/coco-train

The shards hold the unchanged files and all annotations, and train exactly as the loose files do:
give their folder or address as --train-images, without annotations. They are less than 1 %
larger than the images.

An interrupted call continues when it is repeated. Images are checked as training
checks them, by their headers; --decode also decodes every image once.

Credentials of an object store come from the environment, never from its address. The exit code is 2
for data that were refused or damaged, 1 if the storage failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn

from deta.jobs.command_line import OUTPUT, echo, read_options, run_tool
from deta.platform.data.image_sizes import PixelRules
from deta.platform.run.config import DataConfig
from deta.platform.run.run_paths import require_paths

MAX_SHARD_MB = 1900  # a shard is built in memory, and Parquet's arrays end at 2 GB
# What an error advises, as an option of this job.
ADVICE = {
    "data.lenient=true": "--lenient",
    "data.lenient": "--lenient",
    "data.exif=apply": "--exif apply",
    "data.train_images, data.val_images, or --images": "--images",
}


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    images: Path | None = None  # folder of image files
    annotations: Path | None = None  # a file, COCO format
    out: Annotated[str | None, OUTPUT] = None  # new folder, or address of one
    shard_mb: int = 256  # megabytes of a shard
    lenient: bool = False  # leave out invalid records
    decode: bool = False  # decode every image first
    max_pixels: int = DataConfig().max_pixels  # of an image
    exif: Literal["ignore", "apply"] = "ignore"  # as data.exif; train with the same
    verify: str | None = None  # compare all checksums of the shards in this folder


def main() -> NoReturn:
    options = read_options(PackOptions, __doc__)
    run_tool(lambda: _pack(options), lambda _: 0, "repeat the command to continue")


def _pack(options: PackOptions) -> None:
    require_paths({"--images": options.images, "--annotations": options.annotations})
    from deta.platform.data.coco_annotations import DatasetError
    from deta.platform.data.coco_dataset import CocoDataset
    from deta.platform.shards.manifest import read_pack_manifest, verify_shards
    from deta.platform.shards.object_store import ObjectStore
    from deta.platform.shards.packer import MEGABYTE, pack_dataset

    if options.verify is not None:
        store = ObjectStore(options.verify)
        manifest = read_pack_manifest(store)
        verify_shards(store, manifest, progress=True)
        echo(f"{store.shown}: all {len(manifest.shards)} shards are as they were packed")
        return
    if options.images is None or options.annotations is None or options.out is None:
        raise ValueError("give --images, --annotations and --out; or --verify FOLDER")
    if not 1 <= options.shard_mb <= MAX_SHARD_MB:
        raise ValueError(f"--shard-mb {options.shard_mb} is not in 1 .. {MAX_SHARD_MB}")
    store = ObjectStore(options.out)
    try:
        dataset = CocoDataset.open(
            options.images,
            options.annotations,
            lenient=options.lenient,
            max_pixels=options.max_pixels,
            rules=PixelRules(exif=options.exif),
            progress=True,
        )
    except DatasetError as error:  # it advises keys, which are options here
        said = str(error)
        for key, option in ADVICE.items():
            said = said.replace(key, option)
        raise DatasetError(said) from error
    # The notes are stored in the shards, where paths of this machine mean nothing.
    dataset.notes = [
        note.replace(str(options.annotations), options.annotations.name) for note in dataset.notes
    ]
    packed = pack_dataset(
        dataset,
        store,
        shard_bytes=options.shard_mb * MEGABYTE,
        decode=options.decode,
        lenient=options.lenient,
        progress=True,
    )
    manifest = packed.manifest
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    echo(
        f"{store.shown}: {manifest.num_images} images in {len(manifest.shards)} shards "
        f"({packed.num_reused} existed already), {num_bytes / MEGABYTE:,.1f} MB, "
        f"data {manifest.fingerprint[:12]}"
    )


if __name__ == "__main__":
    main()
