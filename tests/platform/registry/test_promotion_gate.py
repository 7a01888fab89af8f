"""The gate accepts a version that meets every criterion of the policy, and no other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deta.platform.evaluation.paired_bootstrap import CategoryDifference, PairedDifference
from deta.platform.registry.promotion_gate import (
    NUM_CLASSES_SHOWN,
    Candidate,
    Decision,
    Latency,
    Policy,
    decide,
)

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


def rows(decision: Decision) -> dict[str, tuple[bool | None, str, str]]:
    return {one.name: (one.passed, one.found, one.required) for one in decision.criteria}


def test_a_decision_as_people_read_it():
    table = decide_on(replace(CHALLENGER, code_is_dirty=True, num_bytes=160_000_000)).table()

    assert table.splitlines() == [
        "criterion               found                       required",
        "weights         passed  the same                    "
        "SHA-256 bbbbbbbbbbbb… in the registry, of its files and of what was evaluated",
        "lineage         passed  complete, uncommitted code  "
        "commit, configuration, data, environment, run",
        "evaluation set  passed  ffffffffffff…               ffffffffffff…, for a comparison",
        "AP              -       43.00                       no limit",
        "AP gain         passed  +3.00, +1.00 to +5.00       95 % interval above +0.00",
        "class drops     passed  no class drops              "
        "no class more than 5.0 below the champion's",
        "class floors    -       -                           none",
        "latency         -       100.0 ms                    no limit",
        "latency ratio   passed  1.00 of 100.0 ms            at most 1.5 of the champion's",
        "size            -       160.0 MB                    no limit",
        "size ratio      FAILED  1.60 of 100.0 MB            at most 1.5 of the champion's",
        "exported form   passed  scores 1e-6                 the detections of the model",
    ]


def test_a_verdict_names_all_that_failed_and_whom_it_beats():
    policy = Policy(max_megabytes=50, max_latency_ms=50)
    assert decide_on(policy=policy).verdict() == ("deta version 2 does not pass: latency, size")
    assert decide_on(champion=None).verdict() == "deta version 2 passes as the first champion"


def test_the_decision_log_gets_every_figure():
    found = replace(difference(), corrected=0.025, resamples=500, p_value=0.02)

    assert decide_on(found=found).measurements() == {
        "ap": 0.43, "megabytes": 100.0, "evaluation_set": "f" * 64, "champion_ap": 0.40,
        "latency": {"milliseconds": 100.0, "device": "one processor"},
        "difference": 0.03, "corrected": 0.025, "low": 0.01, "high": 0.05, "p_value": 0.02,
        "resamples": 500,
    }  # fmt: skip
    first = decide_on(replace(CHALLENGER, latency=None), champion=None)
    assert first.measurements() == {"ap": 0.43, "megabytes": 100.0, "evaluation_set": "f" * 64}
    few = decide_on(found=replace(difference(), low=np.nan, high=np.nan)).measurements()
    assert {"low", "high", "corrected"}.isdisjoint(few)


def test_files_that_cannot_be_used_are_the_only_finding():
    broken = replace(CHALLENGER, fault="its weights have changed")
    decision = decide_on(broken)

    assert (decision.challenger, decision.champion) == (broken, CHAMPION)
    assert decision.policy == Policy()
    assert rows(decision) == {
        "weights": (
            False,
            "its weights have changed",
            "SHA-256 bbbbbbbbbbbb… in the registry, of its files and of what was evaluated",
        )
    }


@pytest.mark.parametrize(
    ("change", "champion", "policy", "name", "row"),
    [
        ({"evaluated_sha256": "cc" * 32}, CHAMPION, Policy(), "weights",
         (False, "the evaluation is of cccccccccccc…")),
        ({"evaluated_sha256": ""}, CHAMPION, Policy(), "weights",
         (False, "the evaluation is of unknown weights…")),
        ({}, CHAMPION, Policy(clean_code=True), "lineage",
         (True, "complete",
          "commit, configuration, data, environment, run, no uncommitted code")),
        ({"code_is_dirty": True}, CHAMPION, Policy(clean_code=True), "lineage",
         (False, "complete, uncommitted code",
          "commit, configuration, data, environment, run, no uncommitted code")),
        ({"missing_lineage": ("commit", "run")}, CHAMPION, Policy(), "lineage",
         (False, "lacks commit, run", "commit, configuration, data, environment, run")),
        ({}, None, Policy(), "evaluation set",
         (None, "ffffffffffff…", "any, for the first champion")),
        ({}, None, Policy(evaluation_set="ffff"), "evaluation set",
         (True, "ffffffffffff…", "ffff…, for a comparison")),
        ({}, replace(CHAMPION, images_fingerprint="e" * 64), Policy(evaluation_set="f" * 64),
         "evaluation set",
         (False, "ffffffffffff…, the champion's is eeeeeeeeeeee…",
          "ffffffffffff…, for a comparison")),
        ({"ap": 0.08}, None, Policy(), "AP",
         (False, "8.00", "at least 10.00 of a first champion, which has no other to beat "
          "(min_first_ap=0.1)")),
        ({"ap": 0.1}, None, Policy(), "AP",
         (True, "10.00", "at least 10.00 of a first champion, which has no other to beat "
          "(min_first_ap=0.1)")),
        ({"ap": 0.3}, None, Policy(min_ap=0.3), "AP", (True, "30.00", "at least 30.00")),
        ({"ap": 0.3}, None, Policy(min_ap=0.1), "AP", (True, "30.00", "at least 10.00")),
        ({}, CHAMPION, Policy(max_class_drop=None), "class drops", (None, "-", "no limit")),
        ({}, CHAMPION, Policy(min_class_ap=0.33), "class floors",
         (True, "all above", "AP of disc 33.0, star 33.0")),
        ({}, CHAMPION, Policy(min_class_ap=0.4, class_floors=(("moon", 0.1),)), "class floors",
         (False, "star 33.0, moon unknown", "AP of disc 40.0, star 40.0, moon 10.0")),
        ({"ap_by_class": {}}, CHAMPION, Policy(class_floors=(("moon", 0.0),)), "class floors",
         (False, "moon unknown", "AP of moon 0.0")),
        ({"latency": None}, None, Policy(), "latency",
         (None, "not measured", "measured, for example by --measure")),
        ({"latency": None}, None, Policy(max_latency_ms=9), "latency",
         (False, "not measured", "measured, for example by --measure")),
        ({"latency": None}, CHAMPION, Policy(max_latency_ratio=None), "latency",
         (None, "not measured", "measured, for example by --measure")),
        ({}, CHAMPION, Policy(max_latency_ms=100), "latency",
         (True, "100.0 ms", "at most 100.0 ms")),
        ({"latency": Latency(150.0, "one processor")}, CHAMPION, Policy(), "latency ratio",
         (True, "1.50 of 100.0 ms", "at most 1.5 of the champion's")),
        ({"latency": Latency(90.0, "another")}, CHAMPION, Policy(), "latency ratio",
         (False, "the champion's was measured on one processor; --measure measures both here",
          "at most 1.5 of the champion's")),
        ({}, replace(CHAMPION, latency=None), Policy(), "latency ratio",
         (False, "the champion's was not measured; --measure measures both here",
          "at most 1.5 of the champion's")),
        ({}, CHAMPION, Policy(max_megabytes=100), "size",
         (True, "100.0 MB", "at most 100.0 MB")),
        ({"num_bytes": 150_000_000}, CHAMPION, Policy(), "size ratio",
         (True, "1.50 of 100.0 MB", "at most 1.5 of the champion's")),
        ({"parity_fault": "model.onnx differs"}, CHAMPION, Policy(parity=False), "exported form",
         (None, "model.onnx differs", "not required")),
        ({"parity": None}, CHAMPION, Policy(), "exported form",
         (True, "", "the detections of the model")),
    ],
)  # fmt: skip
def test_each_row_says_what_was_found_and_what_is_required(
    change: dict[str, object],
    champion: Candidate | None,
    policy: Policy,
    name: str,
    row: tuple[object, ...],
):
    challenger = replace(CHALLENGER, **change)  # type: ignore[arg-type]
    assert rows(decide_on(challenger, champion, policy))[name][: len(row)] == row


@pytest.mark.parametrize("policy", [Policy(max_latency_ratio=None), Policy(max_size_ratio=None)])
def test_a_ratio_without_a_limit_has_no_row(policy: Policy):
    names = set(rows(decide_on(policy=policy)))
    all_names = set(rows(decide_on()))
    assert len(all_names - names) == 1
    assert (all_names - names).pop().removesuffix(" ratio") in ("latency", "size")


def test_a_gain_is_above_the_least_gain_and_not_equal_to_it():
    policy = Policy(min_gain=0.01, confidence=0.9)
    row = rows(decide_on(policy=policy, found=difference(low=0.01)))["AP gain"]
    assert row == (False, "+3.00, +1.00 to +5.00", "90 % interval above +1.00")
    assert rows(decide_on(policy=policy, found=difference(low=0.0101)))["AP gain"][0] is True


def test_a_missing_comparison_passes_neither_gain_nor_drops():
    decision = decide(CHALLENGER, CHAMPION, Policy(), None, NAMES)
    text = "not comparable with the champion's evaluation"
    assert rows(decision)["AP gain"] == (False, text, "95 % interval above +0.00")
    assert rows(decision)["class drops"] == (
        False, text, "no class more than 5.0 below the champion's",
    )  # fmt: skip


def drops(*ap: tuple[float, float], limit: float = 0.05) -> tuple[bool | None, str]:
    """Return the row of class drops for classes 1, 2, … with these AP before and after."""
    found = difference()
    per_category = {
        key: replace(found.per_category[1], ap_a=before, ap_b=after, difference=after - before)
        for key, (before, after) in enumerate(ap, 1)
    }
    decision = decide_on(
        policy=Policy(max_class_drop=limit), found=replace(found, per_category=per_category)
    )
    return rows(decision)["class drops"][:2]


def test_the_largest_drop_comes_first_and_a_drop_of_the_limit_is_allowed():
    assert drops((0.5, 0.25), (0.75, 0.25), limit=0.125) == (
        False, "star 75.0 -> 25.0, disc 50.0 -> 25.0",
    )  # fmt: skip
    assert drops((0.5, 0.5), (0.5, 0.375), limit=0.125) == (
        True, "largest drop: star 50.0 -> 37.5",
    )  # fmt: skip
    assert drops((0.5, 0.5), limit=0.0) == (True, "no class drops")
    assert drops((0.5, 0.4), (0.5, 0.5), (0.5, 0.2))[1] == "3 50.0 -> 20.0, disc 50.0 -> 40.0"
    assert drops() == (True, "no class drops")


def test_few_of_many_classes_are_shown():
    many = decide_on(
        replace(CHALLENGER, ap_by_class={f"class {n}": 0.2 for n in range(30)}),
        policy=Policy(min_class_ap=0.5),
    )
    passed, found, required = rows(many)["class floors"]
    assert passed is False
    shown = [f"class {n} 20.0" for n in range(NUM_CLASSES_SHOWN)]
    assert found == f"{', '.join(shown)} and {30 - NUM_CLASSES_SHOWN} more"
    assert required == "AP of " + found.replace("20.0", "50.0")
    assert drops(*[(0.5, 0.25)] * 30)[1].endswith(f" and {30 - NUM_CLASSES_SHOWN} more")


def test_each_refusal_says_what_is_required():
    decision = decide_on(policy=(policy := Policy(min_ap=0.01)))
    assert (decision.policy, decision.challenger, decision.champion) == (
        policy, CHALLENGER, CHAMPION,
    )  # fmt: skip
    assert decision.difference == difference()
    other = rows(decide_on(replace(CHALLENGER, evaluated_sha256="cc" * 32)))["weights"]
    assert other[2].startswith("SHA-256 bbbbbbbbbbbb… in the registry")
    few = replace(difference(), low=np.nan, high=np.nan, num_images=3)
    gain = rows(decide_on(found=few))["AP gain"]
    assert gain[0] is False
    assert gain[1].startswith("+3.00; ")
    assert gain[2] == "95 % interval above +0.00"
    dropped = rows(decide_on(found=difference(star=-0.1)))["class drops"]
    assert dropped[2] == "no class more than 5.0 below the champion's"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"confidence": 0.499}, "confidence=0.499 is not in 0.5..1"),
        ({"confidence": 1.0}, "confidence=1.0 is not in 0.5..1"),
        ({"resamples": 99}, "resamples=99 are too few for an interval; use 1000"),
        *[({name: value}, f"{name}={value} is not an AP in 0..1")
          for name in ("min_ap", "max_class_drop", "min_first_ap", "min_class_ap")
          for value in (-0.001, 1.001)],
        ({"class_floors": (("disc", 1.5),)}, "disc=1.5 is not an AP in 0..1"),
        *[({"min_gain": value}, f"min_gain={value} is not a difference of AP in 0..1")
          for value in (-1.0, 1.0, -1.5, 1.5)],
        *[({name: 0.0}, f"{name}=0.0 must be above 0, or none")
          for name in ("max_latency_ms", "max_latency_ratio", "max_megabytes", "max_size_ratio")],
    ],
)  # fmt: skip
def test_an_impossible_policy_names_the_key_and_what_is_possible(
    change: dict[str, object], message: str
):
    with pytest.raises(ValueError, match=r"is not|too few|must be") as caught:
        Policy(**change)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_the_ends_of_what_is_possible_are_possible():
    Policy(
        confidence=0.5, resamples=100, min_ap=1, max_class_drop=1, min_first_ap=1, min_class_ap=1,
        min_gain=-0.999, max_latency_ms=0.001, max_latency_ratio=0.001, max_megabytes=0.001,
        max_size_ratio=0.001,
    )  # fmt: skip
    Policy(min_ap=0, max_class_drop=0, min_first_ap=0, min_class_ap=0, min_gain=0.999)
