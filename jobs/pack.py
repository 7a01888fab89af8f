#!/usr/bin/env python
"""Pack a data set into Parquet shards, for slow disks, shared storage and object stores.

  python jobs/pack.py --images train2017 --annotations instances_train2017.json \\
      --output /data/coco-train
  python jobs/pack.py … --output s3://bucket/coco-train
  python jobs/pack.py --verify s3://bucket/coco-train

The shards hold the unchanged files and all annotations, and train exactly as the loose files do:
give their folder or address as --train-images, without annotations. They are less than 1 %
larger than the images.

An interrupted call continues when it is repeated. Images are checked as training
checks them, by their headers; --decode also decodes every image once.

Credentials of an object store come from the environment, never from its address.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import NoReturn

from deta.jobs.command_line import described_parser, refuse
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.image_decoding import MAX_PIXELS
from deta.platform.shards.manifest import read_pack_manifest, verify_shards
from deta.platform.shards.object_store import ObjectStore
from deta.platform.shards.packer import MEGABYTE, pack_dataset

MAX_SHARD_MB = 1900  # a shard is built in memory, and Parquet's arrays end at 2 GB


def main() -> NoReturn:
    parser = described_parser(
        __doc__,
        "The exit code is 2 for data that were refused or damaged, 1 if the storage failed.",
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="folder of image files")
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="COCO format")
    parser.add_argument("--output", metavar="FOLDER", help="new folder, or address of one")
    parser.add_argument("--shard-mb", type=int, default=256, metavar="N", help="default: 256")
    parser.add_argument("--lenient", action="store_true", help="leave out invalid records")
    parser.add_argument("--decode", action="store_true", help="decode every image first")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, metavar="N",
                        help="of an image; default: 50 million")  # fmt: skip
    parser.add_argument("--verify", metavar="FOLDER", help="compare all checksums of shards")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        if arguments.verify is not None:
            _verify(arguments.verify)
        else:
            _pack(parser, arguments)
    except ValueError as error:
        refuse(error)
    except OSError as error:
        print(f"error: {error}; repeat the command to continue", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped; repeat the command to continue", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _pack(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    for option in ("images", "annotations", "output"):
        if getattr(arguments, option) is None:
            parser.error(f"--{option} is missing")
    if not 1 <= arguments.shard_mb <= MAX_SHARD_MB:
        parser.error(f"--shard-mb {arguments.shard_mb} is not in 1 .. {MAX_SHARD_MB}")
    store = ObjectStore(arguments.output)
    dataset = CocoDataset.open(
        arguments.images,
        arguments.annotations,
        lenient=arguments.lenient,
        max_pixels=arguments.max_pixels,
        progress=True,
    )
    # The notes are stored in the shards, where paths of this machine mean nothing.
    dataset.notes = [
        note.replace(str(arguments.annotations), arguments.annotations.name)
        for note in dataset.notes
    ]
    packed = pack_dataset(
        dataset,
        store,
        shard_bytes=arguments.shard_mb * MEGABYTE,
        decode=arguments.decode,
        lenient=arguments.lenient,
        progress=True,
    )
    manifest = packed.manifest
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    print(
        f"{store.shown}: {manifest.num_images} images in {len(manifest.shards)} shards "
        f"({packed.num_reused} existed already), {num_bytes / MEGABYTE:,.1f} MB, "
        f"data {manifest.fingerprint[:12]}"
    )


def _verify(location: str) -> None:
    store = ObjectStore(location)
    manifest = read_pack_manifest(store)
    verify_shards(store, manifest, progress=True)
    print(f"{store.shown}: all {len(manifest.shards)} shards are as they were packed")


if __name__ == "__main__":
    main()
