"""E: pictures that break while a run trains, and annotations that are odd."""

from __future__ import annotations

import json
import math
from typing import Any

from deta.platform.shapes import ShapesDataset
from tests.chaos import oracles
from tests.chaos.direct import Direct, kill
from tests.chaos.runs import Place, TinyRun, expect, read_journal, say
from tests.chaos.scenario import Options, Outcome

NUM_IMAGES = 400  # one per cent of them is four


def pictures_break(place: Place, options: Options) -> Outcome:
    """E1: 1 % of the pictures break after the run has begun; then more than 1 %."""
    data = place.own_data("e1", NUM_IMAGES)
    with TinyRun(
        place, "e1", data=data, schedule__epochs=1, evaluate_every_epochs=1, record=True
    ) as run:  # fmt: skip
        run.start()
        run.wait_for("the first step", run.step)
        broken = _break(data, 4)
        say(f"e1: broke {sorted(broken)}")
        run.finish(400)
        found = _replaced(run.events())
        steps = len(oracles.losses(run.events()))
    expect(steps == 100, f"{steps} steps")
    seen_later = {image for image in broken if image in found}
    say(f"e1: replaced {found}")
    expect(seen_later and set(found) <= set(broken), f"replaced {found}, broken {sorted(broken)}")
    # The same broken files from the first step on, twice, the second time killed and resumed.
    once = Direct(place, "e1-once", data=data, schedule__epochs=1, evaluate_every_epochs=1)
    once.finish(1)
    again = Direct(
        place, "e1-again", data=data, schedule__epochs=1, evaluate_every_epochs=1,
        checkpoint__every_steps=5,
    )  # fmt: skip
    processes = again.start(1)
    again.wait_for_step(40, processes)
    kill(processes)
    again.finish(1)
    expect(
        _replaced(read_journal(once.folder)) == _replaced(read_journal(again.folder)),
        "other replacements after a resumption",
    )
    expect(once.weights() == again.weights(), "other weights after a resumption")
    names = _replaced(read_journal(once.folder))
    expect(set(names) == set(broken), f"replaced {sorted(names)} of {sorted(broken)}")
    expect(all(names[image] == found[image] for image in found), "the replacement depends on luck")
    # One more than the limit allows.
    _break(data, 5)
    over = Direct(place, "e1-over", data=data, schedule__epochs=1, evaluate_every_epochs=1)
    codes = over.run(1)
    expect(codes != [0], "the run went on with more broken pictures than allowed")
    expect("max_broken_share" in over.tail(4000), f"the limit is not told: {over.tail()}")
    return Outcome(
        0, "crashes", True,
        f"{len(seen_later)} of 4 met in the epoch, replaced by the same images at each start; "
        "5 of 400 stop the run",
    )  # fmt: skip


def _break(data: ShapesDataset, number: int) -> set[int]:
    """Cut short, of another type, missing, empty, and cut short again: ids of the last images."""
    order = [
        json.loads(data.train_annotations.read_text())["images"][-1 - i] for i in range(number)
    ]
    for kind, image in enumerate(order):
        path = data.train_images / image["file_name"]
        if kind == 2:
            path.unlink(missing_ok=True)
        elif kind == 1:
            path.write_text("no picture\n")
        elif kind == 3:
            path.write_bytes(b"")
        elif path.exists() and path.stat().st_size > 800:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    return {int(image["id"]) for image in order}


def _replaced(events: list[dict[str, Any]]) -> dict[int, int]:
    """By what each broken image was replaced, the first time."""
    found: dict[int, int] = {}
    for event in events:
        if event["kind"] == "replaced":
            for image in event["images"]:
                found.setdefault(int(image["image_id"]), int(image["by_image_id"]))
    return found


def images_without_boxes(place: Place, options: Options) -> Outcome:
    """E2: a third of the images without boxes, a third with crowds alone, some batches empty."""
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
    return _all_finite(run, "a third of the images empty, a third with crowds alone")


def degenerate_boxes(place: Place, options: Options) -> Outcome:
    """E3: boxes without area, negative, out of the image; NaN is refused before the run."""
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
    from deta.platform.coco import CocoDataset

    notes = " ".join(
        CocoDataset.open(data.train_images, data.train_annotations, lenient=True).notes
    )
    say(f"e3: {planted} planted; {notes}")
    expect(any(word.isdigit() for word in notes.split()), f"no count is told: {notes}")
    poisoned = json.loads(original)
    poisoned["annotations"][0]["bbox"] = [5, 5, math.nan, 10]
    refused = place.own_data("e3-nan")
    refused.train_annotations.write_text(json.dumps(poisoned))
    try:
        CocoDataset.open(refused.train_images, refused.train_annotations)
    except ValueError as error:
        say(f"e3: {str(error)[:150]}")
    else:
        expect(False, "a box of NaN was accepted")
    return _all_finite(run, f"{planted} degenerate boxes dropped with a count; NaN refused")


def _all_finite(run: Direct, note: str) -> Outcome:
    losses = run.losses()
    finite = sum(text != "not finite" for text in losses.values())
    skipped = sum(e["kind"] == "skipped" for e in read_journal(run.folder))
    expect(len(losses) == 32, f"{len(losses)} steps")
    share = 100 * finite / len(losses)
    return Outcome(round(share, 1), "% finite losses", share == 100 and skipped == 0, note)
