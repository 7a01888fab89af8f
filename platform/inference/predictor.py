"""Weights to predictions: pictures in, detections in pixels of each picture out.

Needs neither Ray nor MLflow, so it runs wherever a checkpoint can be copied to.
"""

# N detections in one image

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from deta.model.architectures import Detector, make_detector, without_download
from deta.model.batch import Target, pad_batch
from deta.model.postprocess import Detections
from deta.platform.checkpoint.format import read_checkpoint
from deta.platform.checkpoint.local import find_checkpoint
from deta.platform.data.coco_annotations import Problems, read_coco_file
from deta.platform.data.coco_dataset import Category, CocoDataset, Sample
from deta.platform.data.data_loader import LoadedBatch
from deta.platform.data.image_decoding import (
    EIGHT_BIT_MODES,
    Header,
    ImageError,
    decode,
    read_header,
)
from deta.platform.data.transforms import resize_for_evaluation, resized_size, to_model_input
from deta.platform.evaluation.evaluate_model import EvaluationResult, detect_batches, evaluate_model
from deta.platform.learning.distributed import Worker
from deta.platform.learning.train_step import PRECISIONS
from deta.platform.run.config import RunConfig, override
from deta.platform.system.safe_read import file_sha256
from deta.platform.system.short_list import short_list
from deta.platform.weights.model_file import open_model_file

NUM_READERS = 4  # threads that read and resize pictures while the model works
NUM_SHOWN = 10  # files or classes written out in one message
WINDOW_BATCHES = 32  # among so many batches' pictures, those of one size are looked for
NO_CHANGES: Mapping[str, Any] = MappingProxyType({})
NO_TARGET = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Predictor:
    """A model with all it takes to use it: its classes, its image size, its suppression."""

    def __init__(
        self,
        model: Detector,
        config: RunConfig,
        categories: tuple[Category, ...],
        device: torch.device | str = "cpu",
        description: str = "",
        weights_sha256: str = "",
    ) -> None:
        """A model that is in memory already.

        Args:
            config: says image size (`data.evaluation_size`), `data.max_pixels`, `postprocess` and
                `precision`.
            categories: one for each class index, in ascending order of their ids.
            description: where the weights are from, for people.
            weights_sha256: of the file they are from, if from one.
        """
        if model.config.num_classes != len(categories):
            raise ValueError(
                f"the model has {model.config.num_classes} classes, but {len(categories)} "
                f"categories are given: {_names(categories)}"
            )
        self.config = config
        self.categories = categories
        self.device = torch.device(device)
        self.description = description
        self.weights_sha256 = weights_sha256
        self.model = model.to(self.device).eval()

    @classmethod
    def from_checkpoint(
        cls,
        path: Path,
        device: torch.device | str = "cpu",
        changes: Mapping[str, Any] = NO_CHANGES,
    ) -> Predictor:
        """A model that was trained here.

        Args:
            path: a checkpoint, or a run's folder: see `find_checkpoint`.
            changes: dotted key to value, over the configuration of the run, as for `override`.

        Raises:
            ValueError: there is no checkpoint, it is damaged, or a change does not fit.
        """
        checkpoint = read_checkpoint(find_checkpoint(path))
        config = _without_download(override(checkpoint.config, changes))
        model = make_detector(config.model)
        try:
            model.load_state_dict(checkpoint.model_state())
        except RuntimeError as error:
            raise ValueError(
                f"{checkpoint.path}: its weights do not fit the model that is asked for; leave "
                f"out what changes the model ({error})"
            ) from error
        state = checkpoint.state
        description = f"{checkpoint.path} (step {state.step}, epoch {state.epoch:.2f}"
        if "AP" in state.metrics:
            description += f", AP {state.metrics['AP']:.1f} when it was saved"
        return cls(
            model,
            config,
            checkpoint.categories,
            device,
            description + ")",
            file_sha256(checkpoint.path / "model.safetensors"),
        )

    @classmethod
    def from_published(
        cls,
        path: Path,
        config: RunConfig,
        categories: tuple[Category, ...] | None = None,
        device: torch.device | str = "cpu",
        changes: Mapping[str, Any] = NO_CHANGES,
    ) -> Predictor:
        """A model from a file of the official code, of detrex or of Hugging Face, or from one that
        jobs/convert.py wrote.

        Of a published file the number of classes, levels, layers and channels and the common
        backbones are read from the tensors. What they do not show, such as the numbers of heads
        and queries, `config` must say. `logit_eps` follows the layout, see
        `published_logit_eps`. A file of jobs/convert.py knows all this.

        Args:
            categories: some or all of the file's classes, found by name. Where the file does not
                name its classes, as many as it has, in its order. None: all of the file's; where
                it does not name them, the numbers of its rows.
            changes: dotted key to value, over all of that.

        Raises:
            ValueError: the file cannot be read or does not fit, or has no class of that name.
        """
        file = open_model_file(path, config)
        try:
            rows, categories = file.rows_of(categories)
            model = replace(file.config.model, num_classes=len(categories))
            config = _without_download(override(replace(file.config, model=model), changes))
            detector = make_detector(config.model)
            detector.load_state_dict(file.state_of(rows, config.model))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        classes = f"{len(rows)} of {file.classes.num_rows} classes, {_names(categories)}"
        description = f"{file.origin}; {classes}"
        return cls(detector, config, categories, device, description, file_sha256(path))

    @property
    def category_ids(self) -> list[int]:
        """By class index."""
        return [category.id for category in self.categories]

    @property
    def names(self) -> list[str]:
        """By class index."""
        return [category.name for category in self.categories]

    def check_categories(self, categories: tuple[Category, ...], origin: str) -> None:
        """Refuse a data set whose classes are not the model's.

        Args:
            origin: what they were read from.

        Raises:
            ValueError: says which ids or names differ.
        """
        if categories == self.categories:
            return
        known = {category.id: category.name for category in self.categories}
        given = {category.id: category.name for category in categories}
        differences = [
            f"id {i} is {known[i]!r} there and {given[i]!r} here"
            for i in sorted(known.keys() & given.keys())
            if known[i] != given[i]
        ]
        for which, one, other in (("there", known, given), ("here", given, known)):
            if only := sorted(one.keys() - other.keys()):
                shown = short_list([f"{i} {one[i]!r}" for i in only], 4)
                differences.append(f"only {which}: {shown}")
        raise ValueError(
            f"{origin}: its {len(categories)} categories are not the {len(self.categories)} that "
            f"the model was trained on; {'; '.join(differences[:NUM_SHOWN])}. Ids and names must "
            "be the same"
        )

    def predict(self, images: Sequence[Image.Image], *, batch_size: int = 1) -> list[Detections]:
        """What is in each picture, in pixels of that picture, best first.

        Args:
            images: of any 8-bit mode; an orientation noted in EXIF is ignored, as in training.
            batch_size: pictures at a time, at most. Only pictures of one size go together, so
                none is padded, and an answer does not depend on the other pictures; up to the
                order of float32 sums, which changes scores in the sixth digit.

        Raises:
            ValueError: a picture has more than 8 bits a channel.
        """
        rgb = [_rgb(image) for image in images]
        found = self._predict_planned(
            [self._shape(image.height, image.width) for image in rgb],
            lambda place: self._model_input(_sample(rgb[place], place)),
            batch_size,
        )
        return [detections for _, detections in found]

    def predict_files(
        self,
        paths: Iterable[Path],
        *,
        batch_size: int = 1,
        on_unreadable: Callable[[Path, ImageError], None] | None = None,
    ) -> Iterator[tuple[Path, Detections]]:
        """What is in each picture file, in the order of the paths.

        All headers are checked at once, when this is called. A file can still turn out damaged
        when its pixels are decoded.

        Args:
            batch_size: as for `predict`.
            on_unreadable: is told of such a file, which is then left out. Without it, it raises.

        Raises:
            ImageError: with all files whose header is not good, or the first file that does not
                decode.
        """
        files = [Path(path) for path in paths]
        headers = check_headers(files, self.config.data.max_pixels)

        def read(place: int) -> _Input:
            image = decode(files[place], self.config.data.max_pixels)
            return self._model_input(_sample(image, place))

        def tell(place: int, error: ImageError) -> None:
            if on_unreadable is None:
                raise error
            on_unreadable(files[place], error)

        shapes = [self._shape(header.height, header.width) for header in headers]
        found = self._predict_planned(shapes, read, batch_size, tell)
        return ((files[place], detections) for place, detections in found)

    def evaluate(
        self,
        dataset: CocoDataset,
        *,
        rank: int = 0,
        world_size: int = 1,
        on_batch: Callable[[int], None] | None = None,
    ) -> EvaluationResult | None:
        """COCO AP on a data set, computed as after each epoch of training.

        With several processes each one calls it, inside of a `torch.distributed` group; rank 0
        gets the answer.

        Args:
            on_batch: called with the number of images after each batch, to show progress.

        Raises:
            ValueError: the data set has other categories.
            ImageError: a picture does not decode.
        """
        self.check_categories(dataset.categories, str(dataset.folder))
        config = self.config
        return evaluate_model(
            self.model,
            dataset,
            config.data.evaluation_size,
            config.postprocess,
            batch_size=config.micro_batch_size,
            precision=PRECISIONS[config.precision],
            worker=Worker(rank, world_size, self.device),
            loader_workers=config.data.loader_workers,
            engine=config.evaluation.engine,
            on_batch=on_batch,
        )

    def _predict_planned(
        self,
        shapes: Sequence[tuple[int, int]],
        read: Callable[[int], _Input],
        batch_size: int,
        on_unreadable: Callable[[int, ImageError], None] | None = None,
    ) -> Iterator[tuple[int, Detections]]:
        """The places of the pictures, in their order, with what is in each.

        Args:
            shapes: the (height, width) at which the model sees each picture.
            read: makes the input of the picture at a place; called from several threads.
        """
        plan = batches_of_one_shape(shapes, batch_size)
        finished: dict[int, Detections | None] = {}  # none: not readable

        def batches() -> Iterator[LoadedBatch]:
            reading = _read_ahead(read, [place for batch in plan for place in batch])
            for batch in plan:
                inputs = []
                for place, answer in islice(reading, len(batch)):
                    try:
                        inputs.append(answer.result())
                    except ImageError as error:
                        if on_unreadable is None:
                            raise
                        on_unreadable(place, error)
                        finished[place] = None
                if inputs:
                    yield _collate(inputs)

        next_place = 0

        def in_order() -> Iterator[tuple[int, Detections]]:
            nonlocal next_place
            while next_place in finished:
                found = finished.pop(next_place)
                if found is not None:
                    yield next_place, found
                next_place += 1

        for loaded, detections in detect_batches(
            self.model,
            batches(),
            self.config.postprocess,
            precision=PRECISIONS[self.config.precision],
            device=self.device,
        ):
            finished.update(zip(loaded.image_ids, detections, strict=True))
            yield from in_order()
        yield from in_order()  # what waited for one that then could not be read

    def _shape(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) to which a picture is resized."""
        size = self.config.data.evaluation_size
        return resized_size(height, width, size.short_edge, size.max_long_edge)

    def _model_input(self, sample: Sample) -> _Input:
        resized = resize_for_evaluation(sample, self.config.data.evaluation_size)
        return to_model_input(resized)[0], sample.image_id, sample.original_size_px


# An image 3 h w, normalised; its number; its (height, width) before it was resized.
_Input = tuple[Tensor, int, tuple[int, int]]


def read_listing(annotations: Path) -> tuple[tuple[Category, ...], dict[str, int]]:
    """What an annotation file in COCO's format names: categories by id, and images.

    Returns:
        The categories in ascending order of their ids, and the id of each image by `file_name`.

    Raises:
        DatasetError: the file is broken, or two images have the same file name.
    """
    problems = Problems(annotations)
    coco = read_coco_file(annotations, problems)
    image_ids: dict[str, int] = {}
    for image in coco.images:
        other = image_ids.setdefault(image["file_name"], image["id"])
        if other != image["id"]:
            what = f"{image['file_name']!r} is image {other} already"
            problems.add_error(f"image {image['id']}", "file_name", what)
    problems.raise_errors(lenient=True)
    categories = [Category(category["id"], category["name"]) for category in coco.categories]
    return tuple(sorted(categories, key=lambda category: category.id)), image_ids


def batches_of_one_shape(shapes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Which pictures to look at together: those of one shape, in about their order.

    A picture that is padded beside a larger one gets other features near its right and bottom
    border: the convolutions' biases fill the padding, where alone there would be zeros, and
    GroupNorm counts padding in. Scores shift by hundredths. So nothing is padded here.

    Returns:
        Places, at most `batch_size` in a batch and each once. Pictures wait for others of their
        shape for `WINDOW_BATCHES` batches at most.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    plan = []
    window = batch_size * WINDOW_BATCHES
    for start in range(0, len(shapes), window):
        by_shape: dict[tuple[int, int], list[int]] = {}
        for place in range(start, min(start + window, len(shapes))):
            by_shape.setdefault(shapes[place], []).append(place)
        batches = [
            places[first : first + batch_size]
            for places in by_shape.values()
            for first in range(0, len(places), batch_size)
        ]
        plan += sorted(batches)  # by their first pictures, so that answers wait little
    return plan


def check_headers(paths: Sequence[Path], max_pixels: int) -> list[Header]:
    """Look at the beginning of every picture file.

    Raises:
        ImageError: names each file that is missing, not a picture, or too large.
    """
    headers, faults = [], []
    for _, answer in _read_ahead(lambda path: read_header(path, max_pixels), paths):
        try:
            headers.append(answer.result())
        except ImageError as error:
            faults.append(str(error))
    if not faults:
        return headers
    more = [f"... and {len(faults) - NUM_SHOWN} more"] if len(faults) > NUM_SHOWN else []
    raise ImageError(
        f"{len(faults)} of {len(paths)} pictures cannot be used, so none was looked at:\n  "
        + "\n  ".join(faults[:NUM_SHOWN] + more)
    )


def _read_ahead(
    work: Callable[[Item], Answer], items: Sequence[Item]
) -> Iterator[tuple[Item, Future[Answer]]]:
    """Each item with its answer, in order; a few are worked on while the caller is busy."""
    # Not shut down by a `with`: a caller that gives up leaves this generator to the garbage
    # collector, which may run anywhere, in the start of a thread too, and to wait for threads there
    # waits for ever. The readers of a pool that is gone end by themselves.
    pool = ThreadPoolExecutor(NUM_READERS)
    waiting: deque[tuple[Item, Future[Answer]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) > 2 * NUM_READERS:
            yield waiting.popleft()
    yield from waiting


def _collate(inputs: list[_Input]) -> LoadedBatch:
    images, places, sizes_px = zip(*inputs, strict=True)
    return LoadedBatch(pad_batch(images, [NO_TARGET] * len(images)), list(places), list(sizes_px))


def _sample(image: Image.Image, place: int) -> Sample:
    """A picture that nobody has annotated."""
    return Sample(image, NO_TARGET.boxes, NO_TARGET.labels, place, (image.height, image.width))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode not in EIGHT_BIT_MODES:
        raise ValueError(
            f"a picture of PIL's mode {image.mode} is not of 8 bits; convert it, or read its file "
            "with deta.platform.data.image_decoding.decode"
        )
    return image.convert("RGB")


def _without_download(config: RunConfig) -> RunConfig:
    """Without weights that are about to be replaced anyway."""
    return replace(config, model=without_download(config.model))


def _names(categories: Sequence[Category]) -> str:
    return short_list([repr(category.name) for category in categories], 4)
