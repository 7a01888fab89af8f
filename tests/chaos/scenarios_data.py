"""E: images that break while a run trains, and degenerate annotations."""

from __future__ import annotations

import json
import math
import signal
from typing import Any

from tests.chaos import oracles
from tests.chaos.direct import Direct, break_images, kill
from tests.chaos.runs import BATCH, Place, TinyRun, expect, log_progress, read_journal
from tests.chaos.scenario import Options, Outcome

NUM_IMAGES = 400  # one per cent of them is four


def images_break(place: Place, options: Options) -> Outcome:
    """E1: 1 % of the images break after the run has begun; then more than 1 %."""
    data = place.own_data("e1", NUM_IMAGES)
    with TinyRun(place, "e1", data=data, schedule__epochs=1, evaluate_every_epochs=1) as run:
        run.start()
        run.wait_for("the first step", run.step)
        broken = break_images(data, 4)
        log_progress(f"e1: broke {sorted(broken)}")
        run.wait_for("a replacement", lambda: _replaced(run.events()), 400)
        run.signal(signal.SIGTERM)
        expect(run.wait() == 143, f"after SIGTERM: {run.tail()}")
        # The broken images are still broken when the run resumes.
        run.start(resume=True)
        run.finish(400)
        found = _replaced(run.events())
        steps = len(oracles.losses(run.events()))
    expect(steps == NUM_IMAGES // BATCH, f"{steps} steps")
    log_progress(f"e1: replaced {found}")
    expect(set(found) <= broken, f"replaced {found}, broken {sorted(broken)}")
    # The same images are broken from the first step on, in two runs; the second is killed and
    # resumed.
    fixed: dict[str, Any] = {
        "data": place.own_data("e1-direct", NUM_IMAGES), "schedule__epochs": 1,
        "evaluate_every_epochs": 1, "checkpoint__every_steps": 5,
    }  # fmt: skip
    once = Direct(place, "e1-once", break_images=4, **fixed)
    once.finish(1)
    again = Direct(place, "e1-again", break_images=4, **fixed)
    processes = again.start(1)
    again.wait_for_step(40, processes)
    kill(processes)
    again.finish(1)
    replaced = _replaced(read_journal(once.folder))
    expect(replaced == _replaced(read_journal(again.folder)), "replacements differ after resuming")
    expect(once.weights() == again.weights(), "weights differ after resuming")
    expect(set(replaced) == broken, f"replaced {sorted(replaced)} of {sorted(broken)}")
    expect(all(replaced[image] == found[image] for image in found), "random replacements")
    over = Direct(place, "e1-over", break_images=5, **fixed)  # one more than the limit allows
    codes = over.run(1)
    expect(codes != [0], "the run continued with more broken images than allowed")
    expect("max_broken_share" in over.tail(4000), f"no message names the limit: {over.tail()}")
    return Outcome(
        0, "crashes", True,
        "4 of 400 replaced, by the same images after each start; 5 of 400 stop the run",
    )  # fmt: skip


def _replaced(events: list[dict[str, Any]]) -> dict[int, int]:
    """Return the first replacement of each broken image."""
    found: dict[int, int] = {}
    for event in events:
        if event["kind"] == "replaced":
            for image in event["images"]:
                found.setdefault(int(image["image_id"]), int(image["by_image_id"]))
    return found


def images_without_boxes(place: Place, options: Options) -> Outcome:
    """E2: a third of the images without boxes, a third with crowds only, some batches empty."""
    data = place.own_data("e2")
    document = json.loads(data.train_annotations.read_text())
    kind = {image["id"]: index % 3 for index, image in enumerate(document["images"])}
    kept = []
    for annotation in document["annotations"]:
        if kind[annotation["image_id"]] == 1:
            annotation["iscrowd"] = 1
            annotation["segmentation"] = {"counts": [0, 1], "size": [1, 1]}
        if kind[annotation["image_id"]] != 0:
            kept.append(annotation)
    document["annotations"] = kept
    data.train_annotations.write_text(json.dumps(document))
    run = Direct(place, "e2", data=data, schedule__epochs=2, evaluate_every_epochs=2)
    run.finish(2)
    return _all_finite(run, "a third of the images empty, a third with crowds only")


def degenerate_boxes(place: Place, options: Options) -> Outcome:
    """E3: boxes without area, negative, outside the image; NaN is refused before the run."""
    data = place.own_data("e3")
    document = json.loads(data.train_annotations.read_text())
    original = json.dumps(document)
    planted = 0
    odd = [[5, 5, 0, 10], [5, 5, 10, 0], [20, 20, -5, 8], [500, 500, 10, 10], [-50, -50, 20, 20]]
    for number, annotation in enumerate(document["annotations"]):
        if number % 6 < len(odd):
            annotation["bbox"] = odd[number % 6]
            planted += 1
    data.train_annotations.write_text(json.dumps(document))
    run = Direct(
        place, "e3", data=data, schedule__epochs=2, evaluate_every_epochs=2, data__lenient="true"
    )  # fmt: skip
    run.finish(2)
    from deta.platform.data.coco_dataset import CocoDataset

    notes = " ".join(
        CocoDataset.open(data.train_images, data.train_annotations, lenient=True).notes
    )
    log_progress(f"e3: {planted} planted; {notes}")
    expect(any(word.isdigit() for word in notes.split()), f"no count in the notes: {notes}")
    poisoned = json.loads(original)
    poisoned["annotations"][0]["bbox"] = [5, 5, math.nan, 10]
    refused = place.own_data("e3-nan")
    refused.train_annotations.write_text(json.dumps(poisoned))
    try:
        CocoDataset.open(refused.train_images, refused.train_annotations)
    except ValueError as error:
        log_progress(f"e3: {str(error)[:150]}")
    else:
        expect(False, "a box with NaN was accepted")
    return _all_finite(run, f"{planted} degenerate boxes dropped and counted; NaN refused")


def _all_finite(run: Direct, note: str) -> Outcome:
    losses = run.losses()
    finite = sum(text != "not finite" for text in losses.values())
    skipped = sum(e["kind"] == "skipped" for e in read_journal(run.folder))
    expect(len(losses) == 32, f"{len(losses)} steps")
    share = 100 * finite / len(losses)
    return Outcome(round(share, 1), "% finite losses", share == 100 and skipped == 0, note)
