"""Loads a model from a checkpoint or published weights, and detects objects in images.

It needs neither Ray nor MLflow, so it runs wherever a checkpoint can be copied to.
"""

# N detections in one image

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import deta.model.without_dynamo  # noqa: F401

# isort: split
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from deta.model.architectures import Detector, make_detector, without_download
from deta.model.postprocess import Detections
from deta.platform.checkpoint.format import read_checkpoint
from deta.platform.checkpoint.local import find_checkpoint
from deta.platform.data.coco_dataset import Category, CocoDataset, Sample
from deta.platform.data.data_loader import choose_loader_workers
from deta.platform.data.image_decoding import EIGHT_BIT_MODES, Header, ImageError, decode
from deta.platform.data.transforms import resize_for_evaluation, resized_size, to_model_input
from deta.platform.evaluation.evaluate_model import EvaluationResult, detect_batch, evaluate_model
from deta.platform.inference.batching import (
    batches_of_one_shape,
    check_headers,
    read_ahead,
    read_headers,
)
from deta.platform.learning.distributed import Worker
from deta.platform.learning.numerics import AUTOCAST
from deta.platform.run.config import RunConfig, override
from deta.platform.system.safe_read import file_sha256
from deta.platform.system.short_list import short_list
from deta.platform.weights.model_file import open_model_file
from deta.platform.weights.weight_parts import weights_sha256

NUM_SHOWN = 10  # differences named in one message
NO_CHANGES: Mapping[str, Any] = MappingProxyType({})


class PreparedImage(NamedTuple):
    """An image at the size of the model's input."""

    pixels: Tensor  # 3 h w, uint8
    size_px: tuple[int, int]  # (height, width) before it was resized

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) at the model's input."""
        return self.pixels.shape[1], self.pixels.shape[2]


class Predictor:
    """A model with its classes, image size and postprocessing."""

    def __init__(
        self,
        model: Detector,
        config: RunConfig,
        categories: tuple[Category, ...],
        device: torch.device | str = "cpu",
        description: str = "",
        weights_sha256: str = "",
    ) -> None:
        """Wrap a model that is in memory.

        Args:
            categories: one for each class index, in ascending order of their ids.
            description: the origin of the weights, for people.
            weights_sha256: hash of the file that the weights are from, if any.
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
        """Load a model from a checkpoint of this project.

        Args:
            path: a checkpoint, or the folder of a run; see `find_checkpoint`.
            changes: values by dotted key that override the configuration of the run.

        Raises:
            ValueError: there is no checkpoint, it is damaged, or a change does not fit.
        """
        checkpoint = read_checkpoint(find_checkpoint(path))
        config = _with_changes(checkpoint.config, changes)
        model = make_detector(config.model)
        try:
            model.load_state_dict(checkpoint.model_state())
        except RuntimeError as error:
            raise ValueError(
                f"{checkpoint.path}: its weights do not fit the configured model; leave out "
                f"overrides that change the model ({error})"
            ) from error
        state = checkpoint.state
        ap = f", AP {state.metrics['AP']:.1f} when it was saved" if "AP" in state.metrics else ""
        description = f"{checkpoint.path} (step {state.step}, epoch {state.epoch:.2f}{ap})"
        sha256 = file_sha256(checkpoint.path / "model.safetensors")
        return cls(model, config, checkpoint.categories, device, description, sha256)

    @classmethod
    def from_published(
        cls,
        path: Path,
        config: RunConfig,
        categories: tuple[Category, ...] | None = None,
        device: torch.device | str = "cpu",
        changes: Mapping[str, Any] = NO_CHANGES,
    ) -> Predictor:
        """Load a model from a published file, or from one that jobs/convert.py wrote.

        Args:
            config: what the tensors of a published file do not show, such as the number of heads
                and queries; see `open_model_file`.
            categories: some or all of the file's classes, matched by name. If the file does not
                name its classes, as many as it has, in its order. None: all classes of the file;
                if it does not name them, they are called by their row number.
            changes: values by dotted key that override all of that.

        Raises:
            ValueError: the file cannot be read or does not fit, or lacks one of the classes.
        """
        file = open_model_file(path, config)
        try:
            rows, categories = file.rows_of(categories)
            model = replace(file.config.model, num_classes=len(categories))
            config = _with_changes(replace(file.config, model=model), changes)
            detector = make_detector(config.model)
            detector.load_state_dict(file.state_of(rows, config.model))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        count = f"{len(rows)} of {file.classes.num_rows} classes"
        description = f"{file.origin}; {count}, {_names(categories)}"
        return cls(detector, config, categories, device, description, weights_sha256(path))

    @property
    def category_ids(self) -> list[int]:
        """Category ids by class index."""
        return [category.id for category in self.categories]

    @property
    def names(self) -> list[str]:
        """Category names by class index."""
        return [category.name for category in self.categories]

    def check_categories(self, categories: tuple[Category, ...], origin: str) -> None:
        """Refuse a data set whose classes are not the model's.

        Args:
            origin: the file or folder that has these categories, for the message.

        Raises:
            ValueError: names the ids or names that differ.
        """
        if categories == self.categories:
            return
        known, given = (
            {category.id: category.name for category in some}
            for some in (self.categories, categories)
        )
        differences = [
            f"id {i} is {known[i]!r} there and {given[i]!r} here"
            for i in sorted(known.keys() & given.keys())
            if known[i] != given[i]
        ]
        for which, one, other in (("there", known, given), ("here", given, known)):
            if only := [f"{i} {one[i]!r}" for i in sorted(one.keys() - other.keys())]:
                differences.append(f"only {which}: {short_list(only, 4)}")
        raise ValueError(
            f"{origin}: its {len(given)} categories are not the {len(known)} that the model was "
            f"trained on; {'; '.join(differences[:NUM_SHOWN])}. Ids and names must be the same"
        )

    def prepare(self, image: Image.Image) -> PreparedImage:
        """Resize an 8-bit RGB image as for an evaluation. Any thread may call it."""
        size_px = image.height, image.width
        sample = Sample(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 0, size_px)
        resized = resize_for_evaluation(sample, self.config.data.evaluation_size)
        return PreparedImage(to_model_input(resized)[0], size_px)

    def detect(self, images: Sequence[PreparedImage]) -> list[Detections]:
        """Return the detections in each image of one batch, in pixels before the resize.

        Boxes end at the borders of the image; those of an evaluation may cross them, as in the
        published programs.

        Raises:
            ValueError: the images have different shapes; see `batches_of_one_shape`.
        """
        if len(shapes := sorted({image.shape for image in images})) != 1:
            raise ValueError(f"images of one batch must have one shape, not {shapes}")
        pixels = torch.stack([image.pixels for image in images])
        sizes_px = [image.size_px for image in images]
        found = detect_batch(
            self.model,
            pixels,
            torch.zeros_like(pixels[:, 0], dtype=torch.bool),  # no padding
            sizes_px,
            self.config.postprocess,
            precision=AUTOCAST[self.config.precision],
            device=self.device,
        )
        return [
            replace(one, boxes_px=clip_boxes_to_image(one.boxes_px, size))
            for one, size in zip(found, sizes_px, strict=True)
        ]

    def predict(
        self, images: Sequence[Image.Image], *, batch_size: int | None = None
    ) -> list[Detections]:
        """Return the detections of each image, in pixels of that image, best first.

        Args:
            images: of any 8-bit mode; their EXIF orientation is not looked at.
            batch_size: the most images in a batch; None: as many as keep the device busy. Only
                images of one size form a batch, so none is padded, and detections do not depend on
                the other images, up to the order of float32 sums, which changes scores in the
                sixth digit.

        Raises:
            ValueError: an image has more than 8 bits per channel.
        """
        if wrong := {image.mode for image in images} - EIGHT_BIT_MODES:
            raise ValueError(
                f"an image of PIL's mode {min(wrong)} does not have 8 bits per channel; convert "
                "it, or read its file with deta.platform.data.image_decoding.decode"
            )
        found = self._predict_batches(
            [(image.height, image.width) for image in images],
            lambda index: self.prepare(images[index].convert("RGB")),
            batch_size,
        )
        return [detections for _, detections in found]

    def predict_files(
        self,
        paths: Iterable[Path],
        *,
        batch_size: int | None = None,
        on_unreadable: Callable[[Path, ImageError], None] | None = None,
    ) -> Iterator[tuple[Path, Detections]]:
        """Yield the detections of each image file, in the order of the paths.

        Args:
            batch_size: as for `predict`.
            on_unreadable: called with each file that is no image, too large or damaged, which is
                then left out. Without it, such a file raises.

        Raises:
            ImageError: at once, names all files whose header is bad; later, the first file that
                cannot be decoded.
        """
        files = [Path(path) for path in paths]
        max_pixels, rules = self.config.data.max_pixels, self.config.data.pixel_rules
        headers: list[Header] = []
        if on_unreadable is None:
            headers = check_headers(files, max_pixels, rules)
        else:
            found_headers = read_headers(files, max_pixels, rules)
            for path, header in zip(files, found_headers, strict=True):
                if isinstance(header, ImageError):
                    on_unreadable(path, header)
                else:
                    headers.append(header)
            files = [
                path
                for path, header in zip(files, found_headers, strict=True)
                if not isinstance(header, ImageError)
            ]

        def read(index: int) -> PreparedImage:
            return self.prepare(decode(files[index], max_pixels, rules))

        def handle_unreadable(index: int, error: ImageError) -> None:
            if on_unreadable is None:
                raise error
            on_unreadable(files[index], error)

        sizes_px = [(header.height, header.width) for header in headers]
        found = self._predict_batches(sizes_px, read, batch_size, handle_unreadable)
        return ((files[index], detections) for index, detections in found)

    def evaluate(
        self, dataset: CocoDataset, on_batch: Callable[[int], None] | None = None
    ) -> EvaluationResult:
        """Compute COCO AP on a data set, as after each epoch of training.

        Args:
            on_batch: called with the number of images after each batch, to show progress.

        Raises:
            ValueError: the data set has other categories.
            ImageError: an image cannot be decoded.
        """
        self.check_categories(dataset.categories, str(dataset.folder))
        config = self.config
        evaluation = evaluate_model(
            self.model,
            dataset,
            config.data.evaluation_size,
            config.postprocess,
            batch_size=config.micro_batch_size,
            precision=AUTOCAST[config.precision],
            worker=Worker(0, 1, self.device),
            loader_workers=choose_loader_workers(
                config.data.loader_workers, on_gpu=self.device.type == "cuda"
            ),
            engine=config.evaluation.engine,
            on_batch=on_batch,
        )
        assert evaluation is not None  # the only worker leads
        return evaluation

    def _predict_batches(
        self,
        sizes_px: Sequence[tuple[int, int]],
        read: Callable[[int], PreparedImage],
        batch_size: int | None,
        on_unreadable: Callable[[int, ImageError], None] | None = None,
    ) -> Iterator[tuple[int, Detections]]:
        """Yield the index and detections of each image, in order.

        Args:
            sizes_px: (height, width) of each image.
            read: makes the model's input for the image of an index; called from several threads.
            on_unreadable: called for an image whose `read` raises ImageError; it is left out.
        """
        size = self.config.data.evaluation_size
        shapes = [resized_size(*one, size.short_edge, size.max_long_edge) for one in sizes_px]
        plan = batches_of_one_shape(shapes, batch_size, self.device.type)
        reading = read_ahead(read, [index for batch in plan for index in batch])
        finished: dict[int, Detections | None] = {}  # None: unreadable
        next_index = 0
        for batch in plan:
            images = {}
            for index, future in islice(reading, len(batch)):
                try:
                    images[index] = future.result()
                except ImageError as error:
                    if on_unreadable is None:
                        raise
                    on_unreadable(index, error)
                    finished[index] = None
            if images:
                finished.update(zip(images, self.detect([*images.values()]), strict=True))
            while next_index in finished:
                found = finished.pop(next_index)
                if found is not None:
                    yield next_index, found
                next_index += 1


def _with_changes(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Override values, and skip the download of a backbone, since all weights are replaced."""
    config = override(config, changes)
    return replace(config, model=without_download(config.model))


def _names(categories: Sequence[Category]) -> str:
    return short_list([repr(category.name) for category in categories], 4)
