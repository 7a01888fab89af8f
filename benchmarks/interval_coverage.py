"""Measure how often the intervals of AP and of paired differences cover the truth.

  python benchmarks/interval_coverage.py --draw pictures
  python jobs/evaluate.py RUN --images pictures/val \\
      --annotations pictures/annotations/instances_val.json --out first
  python jobs/evaluate.py OTHER --images ... --out second
  python benchmarks/interval_coverage.py first second             a few minutes
  python benchmarks/interval_coverage.py first second --full      the study of docs/EVALUATION.md

A population is all the pictures of two evaluations of the same ones by trained models, 6,000 drawn
ones for example. Its AP is the truth. Samples are drawn from it without replacement, and each gets
the intervals that this project prints, and the percentile interval of the plain bootstrap. Printed
is which share of them covers the truth, and in which share it lies below and above them. In a
sample the truth is that of the classes that it shows.

Populations: all pictures as they are; `rare`, in which most pictures with two of the classes are
left out, so that a sample shows them in a few images or none; `sizes`, in which each class is
divided into four by the size of the box, so that there are many classes with few images each; and
`one`, with the first class alone. --replace draws with replacement, for a small set.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deta.platform.data.synthetic_shapes import write_shapes
from deta.platform.evaluation.evaluation_folder import read_evaluation
from deta.platform.evaluation.match_table import AREA_RANGES, MatchTable, match_table
from deta.platform.evaluation.paired_bootstrap import (
    difference_of_tables,
    interval_of_table,
)
from deta.platform.evaluation.weighted_ap import ApTable, weighted_ap

POPULATIONS = ("all", "rare", "sizes", "one")
NUM_IMAGES = (30, 67, 120, 250, 500)
SIZE_EDGES_PX = (30, 42, 52)  # square roots of areas
BUCKETS = ((5, 9), (10, 19), (20, 10**9))  # images with a class

Json = dict[str, Any]


@dataclass
class Tally:
    """How often the truth lies below, in and above an interval."""

    inside: int = 0
    below: int = 0
    above: int = 0
    widths: list[float] = field(default_factory=list)

    def add(self, low: float, truth: float, high: float) -> None:
        if math.isnan(low) or math.isnan(truth):
            return
        self.widths.append(high - low)
        self.below += truth < low - 1e-9
        self.above += truth > high + 1e-9
        self.inside += low - 1e-9 <= truth <= high + 1e-9

    def __str__(self) -> str:
        total = self.inside + self.below + self.above
        if not total:
            return "none"
        return (
            f"{100 * self.inside / total:5.1f} % ({100 * self.below / total:4.1f} below, "
            f"{100 * self.above / total:4.1f} above), width {100 * np.mean(self.widths):.1f}, "
            f"of {total}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("evaluations", nargs="*", type=Path, help="two folders of evaluations")
    parser.add_argument("--draw", type=Path, help="draw 6,000 pictures into a folder, and stop")
    parser.add_argument("--populations", nargs="+", default=["all"], choices=POPULATIONS)
    parser.add_argument("--images", nargs="+", type=int, default=[30, 120])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--replace", action="store_true")
    parser.add_argument("--full", action="store_true", help="every population and number of images")
    arguments = parser.parse_args()
    if arguments.draw:
        write_shapes(arguments.draw, num_train=1, num_val=6000, seed=77)
        return
    if len(arguments.evaluations) != 2:
        parser.error("name two folders that jobs/evaluate.py --out wrote, or --draw")
    if arguments.full:
        arguments.populations, arguments.images = POPULATIONS, NUM_IMAGES
        arguments.samples = 250
    a, b = (read_evaluation(folder) for folder in arguments.evaluations)
    for name in arguments.populations:
        truth, results = population(name, a.ground_truth, (a.results, b.results))
        tables = [match_table(truth, one, AREA_RANGES[:1]) for one in results]
        once = np.ones(len(tables[0].image_ids), np.int64)
        true = np.stack([weighted_ap(ApTable.build(t, 1), once).mean(axis=1) for t in tables])
        print(f"## {name}: {len(once)} images, AP "
              f"{' and '.join(f'{100 * np.nanmean(ap):.1f}' for ap in true)}")  # fmt: skip
        for num_images in arguments.images:
            if num_images <= len(once):
                began_s = time.perf_counter()
                measure(tables, true, num_images, arguments)
                print(f"   {time.perf_counter() - began_s:.0f} s", flush=True)


def measure(
    tables: Sequence[MatchTable], true: np.ndarray, num_images: int, arguments: argparse.Namespace
) -> None:
    """Print how often intervals from samples of one size cover the truth, 2 K."""
    tallies: dict[str, Tally] = {}
    corrections: list[tuple[float, float]] = []
    rng = np.random.default_rng(num_images)
    for _ in range(arguments.samples):
        chosen = np.sort(
            rng.choice(len(tables[0].image_ids), num_images, replace=arguments.replace)
        )
        sample = [images_of(table, chosen) for table in tables]
        options: Json = {"resamples": arguments.resamples, "seed": int(rng.integers(2**31))}
        shown = images_with_class(sample[0])
        is_shown = shown > 0

        def add(name: str, low: float, truth: float, high: float) -> None:
            tallies.setdefault(name, Tally()).add(low, truth, high)

        difference = difference_of_tables(*sample, **options)
        for side, table in enumerate(sample):
            found, truth = interval_of_table(table, **options), true[side][is_shown].mean()
            add("AP", found.low, truth, found.high)
            corrections.append((found.ap - truth, found.corrected - truth))
            for k, (_, low, high) in enumerate(found.per_category.values()):
                add(f"a class in {bucket(shown[k])} images", low, true[side][k], high)
        gain = true[1] - true[0]
        add("difference", difference.low, gain[is_shown].mean(), difference.high)
        for k, one in enumerate(difference.per_category.values()):
            name = f"difference of a class in {bucket(shown[k])} images"
            add(name, one.low, gain[k], one.high)
        ends = percentiles(sample, arguments.resamples, rng)
        for side in (0, 1):
            add("AP, plain bootstrap", ends[side, 0], true[side][is_shown].mean(), ends[side, 1])
        add("difference, plain bootstrap", ends[2, 0], gain[is_shown].mean(), ends[2, 1])
    plain, corrected = 100 * np.mean(corrections, axis=0)
    print(f"{num_images} images: AP is too high by {plain:.2f}, corrected by {corrected:.2f}")
    for name in sorted(tallies):
        if tallies[name].widths:
            print(f"   {name:42s} {tallies[name]}")


def images_of(table: MatchTable, chosen: np.ndarray) -> MatchTable:
    """Return the table of images of which some may come again: each is an image of its own."""
    distinct, copies = np.unique(chosen, return_counts=True)
    if len(distinct) == len(chosen):
        return table.of_images(chosen)
    part = table.of_images(distinct)
    place = np.append(0, np.cumsum(copies))[:-1]

    def repeated(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        number = copies[image]
        source = np.repeat(np.arange(len(image)), number)
        within = np.arange(len(source)) - np.repeat(np.cumsum(number) - number, number)
        return source, place[image[source]] + within

    source, image = repeated(part.image)
    order = np.lexsort((image, -part.score[source], part.category[source]))
    source, image = source[order], image[order]
    boxes, box_image = repeated(part.truth_image)
    category = part.category[source]
    return MatchTable(
        image_ids=tuple(range(len(chosen))),
        category_ids=part.category_ids,
        starts=np.searchsorted(category, np.arange(len(part.category_ids) + 1)),
        image=image,
        score=part.score[source],
        row=part.row[source],
        true=part.true[..., source],
        ignored=part.ignored[..., source],
        found=np.full((part.found.shape[0], len(source)), -1),  # AP does not need it
        truth_image=box_image,
        truth_category=part.truth_category[boxes],
        truth_row=part.truth_row[boxes],
        truth_counts=part.truth_counts[:, boxes],
    )


def images_with_class(table: MatchTable) -> np.ndarray:
    counts, length = table.truth_counts[0], len(table.image_ids)
    pairs = np.unique(table.truth_category[counts] * length + table.truth_image[counts])
    return np.bincount(pairs // length, minlength=len(table.category_ids))


def bucket(number: int) -> str:
    for least, most in BUCKETS:
        if least <= number <= most:
            return f"{least} or more" if most == BUCKETS[-1][1] else f"{least} to {most}"
    return "fewer"


def percentiles(
    tables: Sequence[MatchTable], resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the ends of percentile intervals of the AP of both models and of B minus A: 3 2."""
    length = len(tables[0].image_ids)
    draws = [np.bincount(rng.integers(length, size=length), minlength=length)
             for _ in range(resamples)]  # fmt: skip
    prepared = [ApTable.build(table, max(int(draw.max()) for draw in draws)) for table in tables]
    ap = np.array([[np.nanmean(weighted_ap(one, draw)) for one in prepared] for draw in draws])
    values = np.column_stack([ap, ap[:, 1] - ap[:, 0]])
    return np.nanquantile(values, [0.025, 0.975], axis=0).T


def population(
    name: str, truth: Json, results: Sequence[list[Json]]
) -> tuple[Json, list[list[Json]]]:
    """Return the ground truth and detections of a population."""
    if name == "rare":
        return thinned(truth, results, most={4: 70, 5: 250})
    if name == "sizes":
        ids = sorted(one["id"] for one in truth["categories"])

        def divided(rows: list[Json]) -> list[Json]:
            return [row | {"category_id": by_size(ids.index(row["category_id"]), row["bbox"])}
                    for row in rows]  # fmt: skip

        number = len(ids) * (len(SIZE_EDGES_PX) + 1)
        categories = [{"id": i, "name": str(i)} for i in range(number)]
        boxes = divided(truth["annotations"])
        truth = truth | {"categories": categories, "annotations": boxes}
        return truth, [divided(rows) for rows in results]
    if name == "one":
        first = min(one["id"] for one in truth["categories"])

        def chosen(rows: list[Json]) -> list[Json]:
            return [row for row in rows if row["category_id"] == first]

        categories = [one for one in truth["categories"] if one["id"] == first]
        truth = truth | {"categories": categories, "annotations": chosen(truth["annotations"])}
        return truth, [chosen(rows) for rows in results]
    return truth, list(results)


def by_size(rank: int, box: Sequence[float]) -> int:
    side = math.sqrt(box[2] * box[3])
    return rank * (len(SIZE_EDGES_PX) + 1) + int(np.searchsorted(SIZE_EDGES_PX, side))


def thinned(
    truth: Json, results: Sequence[list[Json]], most: dict[int, int]
) -> tuple[Json, list[list[Json]]]:
    """Keep images without the classes of `most`, and for each of these so many with it alone."""
    rng = np.random.default_rng(3)
    classes: dict[Any, set[int]] = {image["id"]: set() for image in truth["images"]}
    for box in truth["annotations"]:
        classes[box["image_id"]].add(box["category_id"])
    kept = {image for image, found in classes.items() if not found & most.keys()}
    for category, number in most.items():
        candidates = [i for i, found in classes.items() if found & most.keys() == {category}]
        kept |= set(rng.choice(candidates, min(number, len(candidates)), replace=False).tolist())

    def chosen(rows: list[Json], key: str = "image_id") -> list[Json]:
        return [row for row in rows if row[key] in kept]

    smaller = {"images": chosen(truth["images"], "id"), "annotations": chosen(truth["annotations"])}
    return truth | smaller, [chosen(rows) for rows in results]


if __name__ == "__main__":
    main()
