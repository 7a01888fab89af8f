"""Read files that users of other tools have met: each is read, or its advice works."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from deta.platform.weights.weight_files import PICKLE_SUFFIXES, WeightsError, read_weights

SHARED = Path(os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[3] / "../shared"))
REPORTED = sorted(
    path
    for path in (SHARED / "reports").rglob("*")
    if path.suffix in (".safetensors", *PICKLE_SUFFIXES)
)


def follow_advice(error: WeightsError, path: Path, new_path: Path) -> None:
    """Run the code that an error advises."""
    advice = re.search(r"torch\.save\(.*, new_path\)$", str(error))
    assert advice, error
    exec(advice[0], {"torch": torch, "path": path, "new_path": new_path})


@pytest.mark.parametrize("path", REPORTED, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_reported_file_is_read_under_plain_names_or_its_advice_works(
    path: Path, tmp_path: Path
) -> None:
    try:
        found = read_weights(path)
    except WeightsError as error:
        follow_advice(error, path, tmp_path / "new.pth")
        found = read_weights(tmp_path / "new.pth")
    assert len(found) > 100
    assert not [n for n in found if "_orig_mod" in n or "module" in n or n == "n_averaged"]


class Settings(dict):
    """As other tools keep their configuration in a checkpoint."""


class Log(list):
    pass


@pytest.mark.parametrize("use_zip", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        lambda model: model,
        lambda model: {"model": model, "epoch": 3},
        lambda model: {"model": None, "ema": model, "updates": 3},
        lambda model: {"settings": Settings(a=1), "log": Log([1, 2]), "model": model},
        lambda model: {"settings": Settings(a=1, b=2), "state_dict": model.state_dict()},
        lambda model: {"model": model.state_dict(), "best": nn.Identity()},
    ],
)
def test_a_pickled_module_is_named_and_the_advice_works(
    content, use_zip: bool, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    path = tmp_path / "a.pth"
    torch.save(content(model), path, _use_new_zipfile_serialization=use_zip)
    with pytest.raises(WeightsError, match=r"would run the code of [\w.]+\.\w") as caught:
        read_weights(path)

    follow_advice(caught.value, path, tmp_path / "new.pth")
    found = read_weights(tmp_path / "new.pth")
    assert found.keys() == model.state_dict().keys()
    assert torch.equal(found["0.weight"], model[0].weight)
