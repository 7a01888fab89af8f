"""The quick chaos scenarios, each as a test; DETA_CHAOS=1 adds the slower ones among them.

`python -m tests.chaos --quick` runs all of them, in ten minutes.

The tests check strictly that a run survives and learns the same. They do not check how fast it
recovers, since other tests run at the same time; `python -m tests.chaos --core` measures that.
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
    made.shared["requested"] = {scenario.id for scenario in QUICK}
    yield made
    made.remove()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scenario", QUICK, ids=[scenario.id for scenario in QUICK])
def test_a_run_survives(scenario: Scenario, place: Place):
    if scenario.id in LONG and "DETA_CHAOS" not in os.environ:
        pytest.skip("slow; set DETA_CHAOS=1 to run it")
    row = scenario.play(place, LENIENT, with_stock=False)
    assert row["passed"], row.get("reason", row)
