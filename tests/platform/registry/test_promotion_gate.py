"""The gate accepts a version that meets every criterion of the policy, and no other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deta.platform.evaluation.paired_bootstrap import CategoryDifference, PairedDifference
from deta.platform.registry.promotion_gate import Candidate, Decision, Latency, Policy, decide

NAMES = {1: "disc", 2: "star"}
CHAMPION = Candidate(
    label="deta version 1", sha256="aa" * 32, evaluated_sha256="aa" * 32,
    images_fingerprint="f" * 64, ap=0.40, ap_by_class={"disc": 0.5, "star": 0.3},
    num_bytes=100_000_000, latency=Latency(100.0, "one processor"), parity="scores 1e-6",
    parity_fault="",
)  # fmt: skip
CHALLENGER = replace(
    CHAMPION, label="deta version 2", sha256="bb" * 32, evaluated_sha256="bb" * 32, ap=0.43,
    ap_by_class={"disc": 0.53, "star": 0.33},
)  # fmt: skip


def difference(low: float = 0.01, high: float = 0.05, star: float = 0.03) -> PairedDifference:
    def category(ap: float, gain: float) -> CategoryDifference:
        return CategoryDifference(ap, ap + gain, gain, gain - 0.02, gain + 0.02, 0.01, 0.02, 30, 60)

    return PairedDifference(
        ap_a=0.40, ap_b=0.43, difference=0.03, low=low, high=high, p_value=0.01,
        per_category={1: category(0.5, 0.03), 2: category(0.3, star)}, resamples=1000, seconds=0.1,
    )  # fmt: skip


def decide_on(
    challenger: Candidate = CHALLENGER,
    champion: Candidate | None = CHAMPION,
    policy: Policy | None = None,
    found: PairedDifference | None = None,
) -> Decision:
    found = difference() if found is None and champion is not None else found
    return decide(challenger, champion, policy or Policy(), found, NAMES)


def test_a_better_one_passes():
    decision = decide_on()

    assert decision.accepted
    assert decision.failed == ()
    assert "AP gain" in decision.table()
    assert decision.verdict() == "deta version 2 passes over deta version 1"


@pytest.mark.parametrize(
    ("found", "failed"),
    [
        (difference(low=-0.02, high=0.01), "AP gain"),  # better by luck, perhaps
        (difference(low=0.0), "AP gain"),
        (difference(star=-0.10), "class drops"),
    ],
)
def test_an_insufficient_difference_is_refused(found: PairedDifference, failed: str):
    decision = decide_on(found=found)

    assert not decision.accepted
    assert decision.failed == (failed,)


def test_a_class_that_drops_is_named():
    row = next(
        one for one in decide_on(found=difference(star=-0.1)).criteria if one.passed is False
    )

    assert row.found == "star 30.0 -> 20.0"


def test_a_class_without_boxes_is_not_a_drop():
    found = difference()
    nothing = replace(found.per_category[2], ap_a=np.nan, ap_b=np.nan, difference=np.nan)
    found = replace(found, per_category={1: found.per_category[1], 2: nothing})

    assert decide_on(found=found).accepted


@pytest.mark.parametrize(
    ("change", "policy", "failed"),
    [
        ({"evaluated_sha256": "cc" * 32}, Policy(), "weights"),
        ({"fault": "its weights have changed"}, Policy(), "weights"),
        ({"missing_lineage": ("commit", "run")}, Policy(), "lineage"),
        ({"code_is_dirty": True}, Policy(clean_code=True), "lineage"),
        ({"images_fingerprint": "e" * 64}, Policy(), "evaluation set"),
        ({}, Policy(evaluation_set="abc"), "evaluation set"),
        ({}, Policy(min_ap=0.5), "AP"),
        ({}, Policy(min_class_ap=0.35), "class floors"),
        ({}, Policy(class_floors=(("disc", 0.6),)), "class floors"),
        ({}, Policy(class_floors=(("moon", 0.1),)), "class floors"),
        ({"latency": None}, Policy(), "latency"),
        ({}, Policy(max_latency_ms=50), "latency"),
        ({"latency": Latency(200.0, "one processor")}, Policy(), "latency ratio"),
        ({"latency": Latency(100.0, "another")}, Policy(), "latency ratio"),
        ({}, Policy(max_megabytes=50), "size"),
        ({"num_bytes": 200_000_000}, Policy(), "size ratio"),
        ({"parity_fault": "model.onnx differs"}, Policy(), "exported form"),
    ],
)
def test_each_criterion_refuses_alone(change: dict[str, object], policy: Policy, failed: str):
    decision = decide_on(replace(CHALLENGER, **change), policy=policy)  # type: ignore[arg-type]

    assert not decision.accepted
    assert failed in decision.failed
    assert set(decision.failed) <= {failed, "AP gain", "class drops"}


def test_the_first_champion_has_only_absolute_criteria():
    decision = decide_on(champion=None)

    assert decision.accepted
    assert not {"AP gain", "class drops", "latency ratio", "size ratio"} & {
        one.name for one in decision.criteria
    }
    assert not decide_on(champion=None, policy=Policy(min_ap=0.5)).accepted
    assert not decide_on(replace(CHALLENGER, parity_fault="none"), champion=None).accepted


def test_a_first_champion_needs_some_ap():
    weak = replace(CHALLENGER, ap=0.014)
    decision = decide_on(weak, champion=None)

    assert decision.failed == ("AP",)
    row = next(one for one in decision.criteria if one.name == "AP")
    assert row.found == "1.40"
    assert row.required == (
        "at least 10.00 of a first champion, which has no other to beat (min_first_ap=0.1)"
    )
    assert decide_on(weak, champion=None, policy=Policy(min_first_ap=0.0)).accepted
    assert decide_on(replace(CHALLENGER, ap=0.1), champion=None).accepted
    stricter = decide_on(weak, champion=None, policy=Policy(min_ap=0.2)).criteria
    assert "at least 20.00" in {one.required for one in stricter}
    assert decide_on(weak).accepted  # it beats a champion, which is what counts


def test_too_few_images_for_an_interval_are_no_gain():
    found = replace(difference(low=np.nan, high=np.nan), num_images=12)
    decision = decide_on(found=found)

    assert decision.failed == ("AP gain",)
    row = next(one for one in decision.criteria if one.name == "AP gain")
    assert row.found == "+3.00; 12 images are too few for an interval; it needs 20"
    values = decision.measurements()
    assert values["difference"] == 0.03
    assert not {"low", "high"} & values.keys()  # NaN is no JSON


def test_two_evaluations_of_other_images_are_not_compared():
    decision = decide(
        replace(CHALLENGER, images_fingerprint="e" * 64), CHAMPION, Policy(), None, {}
    )

    assert decision.failed == ("evaluation set", "AP gain", "class drops")


@pytest.mark.parametrize(
    "change",
    [{"confidence": 1.0}, {"resamples": 5}, {"min_ap": 40.0}, {"min_first_ap": 10.0},
     {"max_size_ratio": 0.0}, {"class_floors": (("disc", 40.0),)}],
)  # fmt: skip
def test_an_impossible_policy_is_refused(change: dict[str, object]):
    with pytest.raises(ValueError, match=next(iter(change)).replace("class_floors", "disc")):
        Policy(**change)  # type: ignore[arg-type]
