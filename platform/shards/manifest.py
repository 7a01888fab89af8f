"""The manifest of a packed data set, and checks that its files are unchanged."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass

import pyarrow as pa

from deta.platform.data.coco_annotations import DatasetError
from deta.platform.data.coco_dataset import Category
from deta.platform.data.progress import progress_bar
from deta.platform.shards.object_store import ObjectStore

MANIFEST = "MANIFEST.json"
UNFINISHED = "PACKING.json"  # the manifest of an incomplete pack
ANNOTATIONS = "annotations.parquet"
FORMAT = "deta shards"
VERSION = 1
SHARD_NAME = re.compile(r"shard-\d{5,}\.parquet")
REPAIR = "copy it again from where it was packed, or pack the data set again with jobs/pack.py"


class ShardError(DatasetError):
    """A missing, truncated or altered shard; the message names it and a remedy."""


@dataclass(frozen=True)
class Shard:
    """One file of images, or of their annotations."""

    name: str
    num_images: int
    num_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if self.name != ANNOTATIONS and not SHARD_NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is not the name of a shard")


@dataclass(frozen=True)
class Manifest:
    """The content of a packed data set: its images, categories, notes and files."""

    fingerprint: str
    num_images: int  # of all shards of a complete pack
    shard_bytes: int  # approximate maximum
    categories: tuple[Category, ...]
    notes: tuple[str, ...]
    annotations: Shard | None  # None: incomplete
    shards: tuple[Shard, ...]

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT, "version": VERSION} | asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, content: bytes, name: str) -> Manifest:
        """Parse a manifest.

        Raises:
            ShardError: this is not a manifest, is damaged, or has an unknown version.
        """
        try:
            values = json.loads(content)
        except ValueError as error:
            raise ShardError(f"{name}: is not JSON ({error}); pack the data set again") from None
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ShardError(f"{name}: is not the manifest of a data set packed by jobs/pack.py")
        if (version := values.pop("version", None)) != VERSION:
            raise ShardError(
                f"{name}: has format version {version}, and this code reads version {VERSION}; "
                "update deta-platform, or pack the data set again"
            )
        try:
            annotations = values["annotations"]
            values |= {
                "categories": tuple(Category(**each) for each in values["categories"]),
                "notes": tuple(values["notes"]),
                "annotations": None if annotations is None else Shard(**annotations),
                "shards": tuple(Shard(**each) for each in values["shards"]),
            }
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise ShardError(
                f"{name}: is damaged ({error}); copy it again, or pack the data set again"
            ) from None


def read_pack_manifest(store: ObjectStore) -> Manifest:
    """Read the manifest of a complete pack.

    Raises:
        ShardError: there is none, it is damaged, or the pack is incomplete.
    """
    try:
        content = store.read(MANIFEST)
    except FileNotFoundError:
        what = "has no MANIFEST.json"
        if UNFINISHED in store.sizes():
            what = "is an incomplete pack; run the same jobs/pack.py command again to finish it"
        raise ShardError(f"{store.shown}: {what}") from None
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{store.name_of(MANIFEST)}: cannot be read: {error}") from None
    manifest = Manifest.from_json(content, store.name_of(MANIFEST))
    if manifest.annotations is None:
        raise ShardError(f"{store.name_of(MANIFEST)}: is incomplete; {REPAIR}")
    return manifest


def check_size(store: ObjectStore, shard: Shard, sizes: dict[str, int]) -> None:
    """Raise ShardError for a file that is missing or has another size than when packed."""
    if shard.name not in sizes:
        raise ShardError(f"{store.name_of(shard.name)}: is missing; {REPAIR}")
    if sizes[shard.name] != shard.num_bytes:
        raise ShardError(
            f"{store.name_of(shard.name)}: has {sizes[shard.name]:,} bytes, and "
            f"{shard.num_bytes:,} were packed; {REPAIR}"
        )


def check_sha256(store: ObjectStore, shard: Shard, content: bytes) -> None:
    """Raise ShardError unless these are the packed bytes."""
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise ShardError(
            f"{store.name_of(shard.name)}: its SHA-256 differs from MANIFEST.json, so it was "
            f"altered; {REPAIR}"
        )


def verify_shards(store: ObjectStore, manifest: Manifest, progress: bool = False) -> None:
    """Read every file of a pack and compare its SHA-256.

    Raises:
        ShardError: names all files that are missing, truncated or altered.
    """
    files = [*manifest.shards, *([manifest.annotations] if manifest.annotations else [])]
    sizes = store.sizes()
    faults = []
    total = sum(file.num_bytes for file in files)
    with progress_bar("checksums", total, is_bytes=True, show=progress) as advance:
        for file in files:
            try:
                check_size(store, file, sizes)
                check_sha256(store, file, store.read(file.name))
            except ShardError as error:
                faults.append(str(error))
            advance(file.num_bytes)
    if faults:
        raise ShardError("\n".join(faults))
