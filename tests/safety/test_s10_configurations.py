"""S10: a configuration is JSON with known keys and a bounded size; YAML is not read at all.

test_s05_no_code_from_files.py checks that nothing imports a YAML reader.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from deta.platform.run.config import MAX_JSON_CHARACTERS, RunConfig, from_json, to_json
from deta.platform.system.safe_read import read_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"nme": "x"}', "nme.*did you mean name"),
        ('{"optim": {"lr": 1e-4, "__class__": 1}}', "optim.__class__"),
        ('{"__init__": {}}', "__init__"),
        ("[" * 100_000, "recursion limit"),
        ('{"name": ' + "[" * 100_000 + "]" * 100_000 + "}", "recursion limit"),
        ('{"name": "' + "x" * MAX_JSON_CHARACTERS + '"}', "at most 1,000,000 characters"),
        ("[]", "should be an object"),
        ("null", "should be an object"),
        ('"!!python/object/apply:os.system [id]"', "should be an object"),
        ('{"name": "../../etc"}', "is not a run name"),
        ('{"name": "a/b"}', "is not a run name"),
        ("{", "Invalid JSON"),
    ],
)
def test_a_bad_configuration_is_an_error_that_says_why(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        from_json(RunConfig, text)


def test_the_size_limit_is_far_above_a_real_configuration():
    assert len(to_json(RunConfig())) < MAX_JSON_CHARACTERS / 50


def test_json_from_anywhere_is_bounded(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text("[" * 1_000_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="decode"):
        read_json(path)
