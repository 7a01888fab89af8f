"""The manifest of a packed data set, and checks that its files are unchanged."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass

import pyarrow as pa

from deta.platform.data.coco_annotations import DatasetError
from deta.platform.data.coco_dataset import Category
from deta.platform.shards.object_store import ObjectStore
from deta.platform.system.progress import progress_bar

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

    @property
    def files(self) -> tuple[Shard, ...]:
        """All files besides the manifest."""
        return self.shards if self.annotations is None else (*self.shards, self.annotations)

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT, "version": VERSION} | asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, content: bytes, name: str) -> Manifest:
        """Parse a manifest; raise ShardError if it is none, damaged, or of an unknown version."""
        try:
            values = json.loads(content)
            found = values.pop("format", None), values.pop("version", None)
            if found != (FORMAT, VERSION):
                raise ValueError(f"format and version {found}, not {(FORMAT, VERSION)}")
            annotations = values["annotations"]
            values |= {
                "categories": tuple(Category(**each) for each in values["categories"]),
                "notes": tuple(values["notes"]),
                "annotations": None if annotations is None else Shard(**annotations),
                "shards": tuple(Shard(**each) for each in values["shards"]),
            }
            return cls(**values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ShardError(
                f"{name}: is no manifest of jobs/pack.py ({error}); {REPAIR}"
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


def check_sizes(store: ObjectStore, manifest: Manifest) -> None:
    """Raise ShardError if a file is missing or has another size than when packed."""
    sizes = store.sizes()
    for file in manifest.files:
        if file.name not in sizes:
            raise ShardError(f"{store.name_of(file.name)}: is missing; {REPAIR}")
        if sizes[file.name] != file.num_bytes:
            raise ShardError(
                f"{store.name_of(file.name)}: has {sizes[file.name]:,} bytes, and "
                f"{file.num_bytes:,} were packed; {REPAIR}"
            )


def read_packed(store: ObjectStore, file: Shard) -> bytes:
    """Read a complete file; raise ShardError unless it has the packed bytes."""
    try:
        content = store.read(file.name)
    except FileNotFoundError:
        raise ShardError(f"{store.name_of(file.name)}: is missing; {REPAIR}") from None
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise ShardError(
            f"{store.name_of(file.name)}: its SHA-256 is not that of the packed file, so it was "
            f"altered; {REPAIR}"
        )
    return content


def verify_shards(store: ObjectStore, manifest: Manifest, progress: bool = False) -> None:
    """Read every file of a pack and compare its SHA-256.

    Raises:
        ShardError: names all files that are missing, truncated or altered.
    """
    faults = []
    total = sum(file.num_bytes for file in manifest.files)
    with progress_bar("checksums", total, is_bytes=True, show=progress) as advance:
        for file in manifest.files:
            try:
                read_packed(store, file)
            except ShardError as error:
                faults.append(str(error))
            advance(file.num_bytes)
    if faults:
        raise ShardError("\n".join(faults))
