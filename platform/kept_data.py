"""The data of a run as they were checked when it began, kept in its folder.

The Ray driver reads them, so that no attempt has to check a large data set again. And a run that is
resumed needs them where pictures have broken since: training bears some, but a data set cannot be
opened with a picture that is not there.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from pathlib import Path
from typing import Literal

from deta.platform.coco import CocoDataset
from deta.platform.run import Run

logger = logging.getLogger(__name__)

DATA_FILE = "data.pickle"  # ours alone: readable for its owner, and never taken from elsewhere
Split = Literal["train", "val"]


def keep_data(run: Run) -> None:
    """Write the run with its data into its folder."""
    data = run.config.data
    hashes = {
        "train": _sha256(data.train_annotations),
        "val": _sha256(data.val_annotations),
    }
    path = run.folder / DATA_FILE
    unfinished = path.with_suffix(".unfinished")
    unfinished.touch(mode=0o600)
    unfinished.write_bytes(pickle.dumps((run, hashes)))
    unfinished.replace(path)


def kept_run(folder: Path) -> Run:
    """The run of a folder, as `keep_data` left it."""
    run: Run = pickle.loads((folder / DATA_FILE).read_bytes())[0]
    return run


def kept_dataset(folder: Path, split: Split, annotations: str) -> CocoDataset | None:
    """The data set that a run began with; none if it is not known or its annotations differ."""
    try:
        run, hashes = pickle.loads((folder / DATA_FILE).read_bytes())
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError):
        return None
    if not annotations or hashes[split] != _sha256(annotations):
        return None
    dataset: CocoDataset = run.train_set if split == "train" else run.val_set
    return dataset


def _sha256(annotations: str) -> str:
    path = Path(annotations)
    if not annotations or not path.is_file():  # of shards, which have their own
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
