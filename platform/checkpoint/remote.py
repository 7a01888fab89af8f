"""Copies of the checkpoints of a run in a second location: a folder or an object store.

    STORE/NAME/
        run.json  mlflow.json  journal.jsonl     copies, as of the last checkpoint
        step-00001200/                           as on disk

MANIFEST.json is written last and deleted first, and a step without it does not count. This order
replaces the renames that object stores lack.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from deta.platform.checkpoint.format import (
    MANIFEST,
    NAME,
    CheckpointError,
    OtherVersionError,
    parse_manifest,
    parse_metrics,
    read_metrics,
)
from deta.platform.checkpoint.host_snapshot import CHUNK_BYTES, write_file
from deta.platform.checkpoint.local import best_checkpoint, delete_checkpoint, newest_checkpoint
from deta.platform.run.fence import Fence, FencedOffError
from deta.platform.system.atomic_write import force_to_disk, make_folder, write_atomic

RUN_FILE, JOURNAL, TRACKING_FILE = "run.json", "journal.jsonl", "mlflow.json"
OBJECT_STORES = ("s3", "gcs", "abfs")  # have no folders; a file appears when it is complete
HARMLESS_OPTIONS = ("scheme", "region", "endpoint_override", "allow_bucket_creation")


class StoreError(RuntimeError):
    """The store cannot be used. The message holds no credentials."""


@dataclass(frozen=True)
class CheckpointStore:
    """A file system and a folder in it."""

    filesystem: FileSystem
    root: str
    address: str  # for messages: without user, password and options
    secrets: tuple[str, ...] = ()

    def explain(self, error: Exception) -> StoreError:
        text = str(error) or type(error).__name__
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return StoreError(
            f"{self.address}: the store cannot be used ({text}); check that it is reachable and "
            "writable, or set checkpoint.store=none"
        )


def open_store(address: str | Path | CheckpointStore) -> CheckpointStore:
    """Return the store at an address, without connecting to it.

    Args:
        address: a folder, or a URI that pyarrow knows: s3://bucket/runs, gs://…, file:///…

    Raises:
        ValueError: the address is not valid. The message holds no credentials.
    """
    if isinstance(address, CheckpointStore):
        return address
    if "://" not in str(address):
        folder = Path(address).expanduser().absolute()
        return CheckpointStore(LocalFileSystem(), folder.as_posix(), str(folder))
    shown = without_credentials(str(address))
    try:
        filesystem, root = FileSystem.from_uri(str(address))
    except Exception as error:  # its message quotes the address
        kind = type(error).__name__
    else:
        return CheckpointStore(filesystem, root.rstrip("/") or root, shown, _secrets(str(address)))
    raise ValueError(
        f"checkpoint.store={shown}: is neither a folder nor an address that pyarrow can open "
        f"({kind}); write it like s3://bucket/runs, with credentials in the environment"
    )


def without_credentials(address: str) -> str:
    """Return an address without user, password, options and fragment."""
    scheme, _, rest = address.partition("://")
    place = rest.rpartition("@")[2]  # a password may hold any character, escaped or not
    return f"{scheme}://{place.partition('?')[0].partition('#')[0]}"


def copy_run(
    store: CheckpointStore, run_folder: Path, newest: Path, *, keep: int, fence: Fence | None = None
) -> None:
    """Copy the newest and the best checkpoint of a run and its records; delete old checkpoints.

    Args:
        newest: RUN/checkpoints/step-…, complete.
        keep: how many of the newest to keep in the store, besides the best by AP.

    Raises:
        StoreError: the store cannot be reached or written, or holds another run of this name.
        FencedOffError: another worker group writes this run now.
    """
    try:
        place = _RunFolder(store, run_folder.name)
        place.require_same_run(run_folder)
        place.put_record(RUN_FILE, _bytes_of(run_folder / RUN_FILE))
        best = best_checkpoint(run_folder / "checkpoints")
        for path in filter(None, {newest: None, best: None}):  # that of the best may have failed
            try:
                place.put_checkpoint(path, fence)
            except FileNotFoundError:
                if path == newest or path.exists():  # else a better one replaced it meanwhile
                    raise
        # The tracking record holds an offset in the journal, and must not be ahead of it.
        record = _bytes_of(run_folder / TRACKING_FILE)
        place.put_record(JOURNAL, _bytes_of(run_folder / JOURNAL))
        place.put_record(TRACKING_FILE, record)
        place.delete_old(keep, protect=newest.name, fence=fence)
    except (StoreError, FencedOffError):
        raise
    except Exception as error:  # errors of any file system: OSError, Arrow's, a cloud SDK's
        explained = store.explain(error)
    else:
        return
    raise explained  # without its cause, whose message may hold credentials


def restore_from_store(
    store: str | Path | CheckpointStore,
    run_name: str,
    run_folder: Path,
    report: Callable[[str], None] = lambda _: None,
) -> bool:
    """Fetch what the folder of a run lacks; return whether anything was fetched.

    Fetches the newest intact checkpoint if the folder has none or an older one, the best one, and
    the records of the run if they are missing or older than that checkpoint.

    Args:
        report: receives a line about each checkpoint that is fetched or damaged.

    Raises:
        StoreError: the store cannot be reached, or holds another run of this name.
        OtherVersionError: its checkpoint has a newer format version.
        ValueError: the address is not valid.
    """
    opened = open_store(store)
    try:
        return _restore(_RunFolder(opened, run_name), run_folder, report)
    except (StoreError, CheckpointError):
        raise
    except Exception as error:
        explained = opened.explain(error)
    raise explained


def _restore(place: _RunFolder, run_folder: Path, report: Callable[[str], None]) -> bool:
    folder = run_folder / "checkpoints"
    place.require_same_run(run_folder)
    stored = place.checkpoints()
    local = newest_checkpoint(folder, report)
    newer = [name for name in reversed(stored) if local is None or local.state.step < _step(name)]
    fetched = is_behind = any(place.fetch_checkpoint(name, folder, report) for name in newer)
    best = place.best(stored)
    if best is not None and not (folder / best).exists():
        ours = best_checkpoint(folder)
        if ours is None or read_metrics(ours).get("AP", -math.inf) < place.ap(best):
            fetched |= place.fetch_checkpoint(best, folder, report)

    theirs = {name: place.get(name) for name in (JOURNAL, TRACKING_FILE, RUN_FILE)}
    ours_now = {name: _bytes_of(run_folder / name) for name in theirs}
    is_longer = len(theirs[JOURNAL] or b"") > len(ours_now[JOURNAL] or b"")
    outdated = {
        JOURNAL: is_longer,
        TRACKING_FILE: is_longer or ours_now[TRACKING_FILE] is None,  # it counts in the journal
        RUN_FILE: is_behind or ours_now[RUN_FILE] is None,
    }
    for name, content in theirs.items():
        if outdated[name] and content is not None and content != ours_now[name]:
            run_folder.mkdir(parents=True, exist_ok=True)
            write_atomic(run_folder / name, content, durable=True)
            fetched = True
    return fetched


@dataclass(frozen=True)
class _RunFolder:
    """The folder of one run in a store. Errors are those of the file system."""

    store: CheckpointStore
    run_name: str

    @property
    def _files(self) -> FileSystem:
        return self.store.filesystem

    def _path(self, *names: str) -> str:
        return "/".join(filter(None, (self.store.root, self.run_name, *names)))

    def get(self, *names: str) -> bytes | None:
        """Return the content of a file, or None if it does not exist."""
        path = self._path(*names)
        if self._files.get_file_info(path).type != FileType.File:
            return None
        with self._files.open_input_stream(path) as stream:
            return stream.read()

    def put_record(self, name: str, content: bytes | None) -> None:
        """Write a file, if there is content, completely or not at all."""
        if content is None:
            return
        path = self._path(name)
        first = f"{path}.unfinished" if self._make_folder() else path
        with self._files.open_output_stream(first) as stream:
            stream.write(content)
        if first != path:
            self._files.move(first, path)

    def _make_folder(self, *names: str) -> bool:
        """Make a folder, and return True, if this store has folders."""
        has_folders = self._files.type_name not in OBJECT_STORES
        if has_folders:
            self._files.create_dir(self._path(*names), recursive=True)
        return has_folders

    def require_same_run(self, run_folder: Path) -> None:
        """Refuse to mix two runs of the same name."""
        ours, theirs = _key(_bytes_of(run_folder / RUN_FILE)), _key(self.get(RUN_FILE))
        if ours is not None and theirs is not None and ours != theirs:
            raise StoreError(
                f"{self.store.address}: holds another run named {self.run_name}; choose another "
                "name=, or remove it from the store"
            )

    def checkpoints(self) -> list[str]:
        """Return the names of complete checkpoints, by step."""
        return sorted((name for name, complete in self.steps().items() if complete), key=_step)

    def steps(self) -> dict[str, bool]:
        """Return every step folder, and whether it has a manifest."""
        selector = FileSelector(self._path(), allow_not_found=True)
        names = [
            info.base_name
            for info in self._files.get_file_info(selector)
            if info.type == FileType.Directory and NAME.fullmatch(info.base_name)
        ]
        manifests = self._files.get_file_info([self._path(name, MANIFEST) for name in names])
        return {
            name: info.type == FileType.File for name, info in zip(names, manifests, strict=True)
        }

    def ap(self, name: str) -> float:
        return parse_metrics(self.get(name, "state.json") or b"").get("AP", -math.inf)

    def best(self, names: list[str]) -> str | None:
        """Return the checkpoint with the highest AP, the newest of equals."""
        ap, _, name = max(((self.ap(n), _step(n), n) for n in names), default=(-math.inf, 0, None))
        return name if ap > -math.inf else None

    def put_checkpoint(self, path: Path, fence: Fence | None) -> None:
        manifest = (path / MANIFEST).read_bytes()
        if self.get(path.name, MANIFEST) == manifest:
            return
        self._delete_file(path.name, MANIFEST)  # this step was written again
        self._make_folder(path.name)
        for name, expected in parse_manifest(manifest, path / MANIFEST).items():
            copied = self._path(path.name, name)
            with (path / name).open("rb") as source, self._files.open_output_stream(copied) as to:
                shutil.copyfileobj(source, to, CHUNK_BYTES)
            size = self._files.get_file_info(copied).size
            if size != expected.num_bytes:
                raise OSError(
                    f"{path.name}/{name} has {size} bytes there, not {expected.num_bytes}"
                )
        if fence is not None:
            fence.check()
        with self._files.open_output_stream(self._path(path.name, MANIFEST)) as stream:
            stream.write(manifest)

    def delete_old(self, keep: int, protect: str, fence: Fence | None) -> None:
        if fence is not None:
            fence.check()
        complete = self.checkpoints()
        for name in self.steps().keys() - {*complete[-keep:], protect, self.best(complete)}:
            self._delete_file(name, MANIFEST)
            self._files.delete_dir(self._path(name))

    def _delete_file(self, *names: str) -> None:
        if self._files.get_file_info(self._path(*names)).type == FileType.File:
            self._files.delete_file(self._path(*names))

    def fetch_checkpoint(self, name: str, folder: Path, report: Callable[[str], None]) -> bool:
        """Fetch a checkpoint into the folder if every byte is as it was written."""
        where = f"{self.store.address}/{self.run_name}/{name}"
        unfinished = folder / f".{name}.{secrets.token_hex(4)}.unfinished"
        make_folder(folder)
        unfinished.mkdir()
        try:
            text = self.get(name, MANIFEST) or b""
            for file, expected in parse_manifest(text, f"{where}/{MANIFEST}").items():
                with self._files.open_input_stream(self._path(name, file)) as stream:
                    chunks = iter(lambda: memoryview(stream.read(CHUNK_BYTES)), b"")
                    if write_file(unfinished / file, chunks) != expected:
                        raise CheckpointError(f"{where}/{file}: has changed since it was written")
            write_file(unfinished / MANIFEST, [memoryview(text)])
            force_to_disk(unfinished)
            if (folder / name).exists():  # damaged, and could not be set aside
                delete_checkpoint(folder / name)
            unfinished.rename(folder / name)
            force_to_disk(folder)
        except OtherVersionError:
            raise
        except (CheckpointError, FileNotFoundError) as error:
            report(f"{where}: is damaged ({error}); trying an older checkpoint")
            return False
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        report(f"{where}: fetched from the store")
        return True


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _bytes_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _key(run: bytes | None) -> Any:
    try:
        return json.loads(run or b"null")["key"]
    except (ValueError, KeyError, TypeError):
        return None


def _secrets(address: str) -> tuple[str, ...]:
    """Return the secrets of an address, the longest first."""
    parts = urlsplit(address)
    found = parts.netloc.rpartition("@")[0].split(":")
    found += [value for key, value in parse_qsl(parts.query) if key not in HARMLESS_OPTIONS]
    both = {*found, *(unquote(one) for one in found)}
    return tuple(sorted((one for one in both if one), key=len, reverse=True))
