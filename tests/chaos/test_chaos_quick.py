"""The chaos scenarios of every day, each as a test; with DETA_CHAOS=1 those, too, that take long.

`python -m tests.chaos --quick` plays all of them, in ten minutes.

Whether a run survives and what it learns is asked as strictly as ever; how fast it recovers is
not, since other tests run beside. The figures for that come from `python -m tests.chaos --core`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from tests.chaos.catalogue import SCENARIOS
from tests.chaos.runs import Place
from tests.chaos.scenario import Options, Scenario

QUICK = [scenario for scenario in SCENARIOS if scenario.quick]
LENIENT = Options(repeats=2, slack=8.0, soak_s=20)
LONG = {"A4", "D1", "E1"}  # one to two minutes each


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    pytest.importorskip("ray")
    made = Place.make()
    made.patience = LENIENT.slack
    made.shared["asked"] = {scenario.id for scenario in QUICK}
    yield made
    made.remove()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scenario", QUICK, ids=[scenario.id for scenario in QUICK])
def test_a_run_survives(scenario: Scenario, place: Place):
    if scenario.id in LONG and "DETA_CHAOS" not in os.environ:
        pytest.skip("takes long; set DETA_CHAOS=1")
    row = scenario.play(place, LENIENT, with_stock=False)
    assert row["passed"], row.get("reason", row)
