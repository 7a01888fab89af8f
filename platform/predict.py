"""Weights to predictions: pictures in, detections in pixels of each picture out.

Needs neither Ray nor MLflow, so it runs wherever a checkpoint can be copied to.
"""

# N detections in one image

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from deta.model.batch import Target, pad_batch
from deta.model.detector import DETA, ModelConfig
from deta.model.postprocess import Detections
from deta.model.pretrained import detect_format, published_logit_eps, rename_from_published
from deta.platform.checkpoint import MANIFEST, all_checkpoints, best_checkpoint, read_checkpoint
from deta.platform.coco import Category, CocoDataset, Sample
from deta.platform.coco_json import Problems, read_coco_file
from deta.platform.config import RunConfig, override
from deta.platform.detect import Evaluation, Worker, detect_batches, evaluate_model
from deta.platform.images import EIGHT_BIT_MODES, ImageError, decode, read_header
from deta.platform.initial import published_state
from deta.platform.loader import LoadedBatch
from deta.platform.training import PRECISIONS
from deta.platform.transforms import resize_for_evaluation, to_model_input
from deta.platform.weights import read_weights

NUM_READERS = 4  # threads that read and resize pictures while the model works
NUM_SHOWN = 10  # files or classes written out in one message
NO_CHANGES: Mapping[str, Any] = MappingProxyType({})
NO_TARGET = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Predictor:
    """A model with all it takes to use it: its classes, its image size, its suppression."""

    def __init__(
        self,
        model: DETA,
        config: RunConfig,
        categories: tuple[Category, ...],
        device: torch.device | str = "cpu",
        description: str = "",
    ) -> None:
        """A model that is in memory already.

        Args:
            config: says image size (`data.evaluation_size`), `data.max_pixels`, `postprocess` and
                `precision`.
            categories: one for each class index, in ascending order of their ids.
            description: where the weights are from, for people.
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
        model = DETA(config.model)
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
        return cls(model, config, checkpoint.categories, device, description + ")")

    @classmethod
    def from_published(
        cls,
        path: Path,
        config: RunConfig,
        categories: tuple[Category, ...] | None = None,
        device: torch.device | str = "cpu",
        changes: Mapping[str, Any] = NO_CHANGES,
    ) -> Predictor:
        """A model from a file of the official code, of detrex or of Hugging Face.

        The number of classes, levels, layers and channels is read from the tensors. What they do
        not show, such as the backbone and the numbers of heads and queries, `config` must say.
        `logit_eps` follows the layout, see `published_logit_eps`.

        Args:
            categories: as many as the file has classes, or some of them, whose ids are then the
                file's rows, as for COCO. None: all rows, with their numbers for names.
            changes: dotted key to value, over all of that.

        Raises:
            ValueError: the file cannot be read or does not fit; names what is missing.
        """
        if (path.parent / MANIFEST).is_file():
            raise ValueError(f"{path}: is one file of a checkpoint; give its folder, {path.parent}")
        tensors = read_weights(path)
        try:
            format_ = detect_format(tensors)
            model = _with_sizes_of(rename_from_published(tensors), config.model)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        num_rows = model.num_classes
        if categories is None:
            categories = tuple(Category(row, str(row)) for row in range(num_rows))
        model = replace(model, num_classes=len(categories), logit_eps=published_logit_eps(format_))
        config = _without_download(override(replace(config, model=model), changes))
        detector = DETA(config.model)
        detector.load_state_dict(published_state(config.model, path, categories))
        rows = [category.id for category in categories]
        if len(rows) == num_rows:
            rows = list(range(num_rows))
        description = (
            f"{path} ({format_} layout, {num_rows} classes; rows {_some(rows)} are taken for "
            f"{_names(categories)})"
        )
        return cls(detector, config, categories, device, description)

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
                shown = _some([f"{i} {one[i]!r}" for i in only])
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
            batch_size: pictures at a time. The default gives each picture an answer that does not
                depend on the others; in a batch, smaller ones are padded, which shifts scores a
                little, and a GPU is faster.

        Raises:
            ValueError: a picture has more than 8 bits a channel.
        """
        samples = (_sample(_rgb(image), place) for place, image in enumerate(images))
        inputs = map(self._model_input, samples)
        return [found for _, detections in self._detect(inputs, batch_size) for found in detections]

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
        check_headers(files, self.config.data.max_pixels)
        return self._predict_checked(files, batch_size, on_unreadable)

    def evaluate(
        self,
        dataset: CocoDataset,
        *,
        rank: int = 0,
        world_size: int = 1,
        on_batch: Callable[[int], None] | None = None,
    ) -> Evaluation | None:
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
            on_batch=on_batch,
        )

    def _predict_checked(
        self,
        files: list[Path],
        batch_size: int,
        on_unreadable: Callable[[Path, ImageError], None] | None,
    ) -> Iterator[tuple[Path, Detections]]:
        def read(place: int) -> _Input:
            image = decode(files[place], self.config.data.max_pixels)
            return self._model_input(_sample(image, place))

        def readable() -> Iterator[_Input]:
            for place, answer in _read_ahead(read, range(len(files))):
                try:
                    yield answer.result()
                except ImageError as error:
                    if on_unreadable is None:
                        raise
                    on_unreadable(files[place], error)

        for places, detections in self._detect(readable(), batch_size):
            for place, found in zip(places, detections, strict=True):
                yield files[place], found

    def _model_input(self, sample: Sample) -> _Input:
        resized = resize_for_evaluation(sample, self.config.data.evaluation_size)
        return to_model_input(resized)[0], sample.image_id, sample.original_size_px

    def _detect(
        self, inputs: Iterator[_Input], batch_size: int
    ) -> Iterator[tuple[list[int], list[Detections]]]:
        """The numbers of the pictures of each batch, and their detections."""
        for loaded, detections in detect_batches(
            self.model,
            _batches(inputs, batch_size),
            self.config.postprocess,
            precision=PRECISIONS[self.config.precision],
            device=self.device,
        ):
            yield loaded.image_ids, detections


# An image 3 h w, normalised; its number; its (height, width) before it was resized.
_Input = tuple[Tensor, int, tuple[int, int]]


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a person means by a path; not verified.

    Args:
        path: a checkpoint; or a run's folder, its `checkpoints` folder, or `best` in either, all
            of which mean the run's checkpoint with the highest AP. Where none has an AP, because
            the validation set had no boxes, the newest.

    Raises:
        ValueError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    folder = path.parent if path.name == "best" and not path.exists() else path
    for candidates in (folder / "checkpoints", folder):
        if found := all_checkpoints(candidates):
            return best_checkpoint(candidates) or found[-1]
    if not folder.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    raise ValueError(
        f"{path}: is neither a checkpoint (no {MANIFEST} in it) nor a run with checkpoints; give "
        "…/NAME or …/NAME/checkpoints/step-…"
    )


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
            problems.refuse(f"image {image['id']}", "file_name", what)
    problems.raise_if_refused(lenient=True)
    categories = [Category(category["id"], category["name"]) for category in coco.categories]
    return tuple(sorted(categories, key=lambda category: category.id)), image_ids


def check_headers(paths: Sequence[Path], max_pixels: int) -> None:
    """Look at the beginning of every picture file.

    Raises:
        ImageError: names each file that is missing, not a picture, or too large.
    """
    faults = []
    for _, answer in _read_ahead(lambda path: read_header(path, max_pixels), paths):
        try:
            answer.result()
        except ImageError as error:
            faults.append(str(error))
    if not faults:
        return
    more = [f"... and {len(faults) - NUM_SHOWN} more"] if len(faults) > NUM_SHOWN else []
    raise ImageError(
        f"{len(faults)} of {len(paths)} pictures cannot be used, so none was looked at:\n  "
        + "\n  ".join(faults[:NUM_SHOWN] + more)
    )


def _read_ahead(
    work: Callable[[Item], Answer], items: Sequence[Item]
) -> Iterator[tuple[Item, Future[Answer]]]:
    """Each item with its answer, in order; a few are worked on while the caller is busy."""
    with ThreadPoolExecutor(NUM_READERS) as pool:
        waiting: deque[tuple[Item, Future[Answer]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > 2 * NUM_READERS:
                yield waiting.popleft()
        yield from waiting


def _batches(inputs: Iterator[_Input], batch_size: int) -> Iterator[LoadedBatch]:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    gathered: list[_Input] = []
    for one in inputs:
        gathered.append(one)
        if len(gathered) == batch_size:
            yield _collate(gathered)
            gathered = []
    if gathered:
        yield _collate(gathered)


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
            "with deta.platform.images.decode"
        )
    return image.convert("RGB")


def _with_sizes_of(state: Mapping[str, Tensor], config: ModelConfig) -> ModelConfig:
    """The configuration with the sizes that the tensors, under our names, show for certain.

    Heads and points show only as their product, so they stay as configured: a wrong guess could
    fit, and give wrong boxes. A tensor that is missing is told of when the model is filled.
    """
    sizes: dict[str, int] = {}
    if (heads := state.get("class_heads.0.bias")) is None:
        raise ValueError("holds no class heads, so it is not a whole DETA")
    sizes["num_classes"] = len(heads)
    if (levels := state.get("level_embedding")) is not None:
        sizes["num_levels"], sizes["dim"] = levels.shape
    if (linear := state.get("encoder.layers.0.ffn.linear1.bias")) is not None:
        sizes["ffn_dim"] = len(linear)
    for part in ("encoder", "decoder"):
        layers = {name.split(".")[2] for name in state if name.startswith(f"{part}.layers.")}
        sizes[f"{part}_layers"] = len(layers)
    return replace(config, **sizes)  # type: ignore[arg-type]


def _without_download(config: RunConfig) -> RunConfig:
    """Without weights that are about to be replaced anyway."""
    backbone = replace(config.model.backbone, pretrained=False)
    return replace(config, model=replace(config.model, backbone=backbone))


def _names(categories: Sequence[Category]) -> str:
    return _some([repr(category.name) for category in categories])


def _some(values: Sequence[object], limit: int = 4) -> str:
    shown = ", ".join(map(str, values[:limit]))
    return shown + (", …" if len(values) > limit else "")
