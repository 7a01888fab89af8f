"""The bootstrap in Ray tasks gives the same numbers as without Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cluster

SCRIPT = """
from deta.platform.evaluation.paired_bootstrap import paired_difference
from deta.platform.cluster.bootstrap_tasks import ray_tasks
from tests.platform.evaluation.detection_cases import random_case

truth, results = random_case(3, num_images=40)
other = results[::2]
with ray_tasks(print) as ray_map:
    tasks = paired_difference(truth, results, other, resamples=90, map=ray_map)
plain = paired_difference(truth, results, other, resamples=90)
assert plain.low < plain.high
assert (tasks.low, tasks.high, tasks.p_value) == (plain.low, plain.high, plain.p_value)
for key, one in plain.per_category.items():
    assert repr(one) == repr(tasks.per_category[key])
print("the same")
"""


def test_any_number_of_tasks_gives_the_same_interval(ray_cluster: Any) -> None:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).resolve().parents[3],
        env=ray_cluster.env,
        capture_output=True,
        text=True,
        timeout=600,
    )

    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "the same"
    assert found.stdout.startswith("Ray cluster at ")
