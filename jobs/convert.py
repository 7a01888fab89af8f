#!/usr/bin/env python
"""Convert published weights to our layout and back, with a report on every tensor.

  python jobs/convert.py deta_checkpoint0011.pth                    print the report only
  python jobs/convert.py deta_checkpoint0011.pth --to ours          deta_checkpoint0011.safetensors
  python jobs/convert.py ~/deta-runs/my-run --to official           my-run.official.pth
  python jobs/convert.py --list                                     where published files are

SOURCE is a file of the official code, of detrex or of Hugging Face (.pth, .pt, .bin, .ckpt,
.safetensors), or a folder of Hugging Face with weights in one or several files;
a run or checkpoint of ours, or a file that this tool wrote; a backbone of a published configuration
(detectron2's torchvision R-50.pkl, torchvision's and the Swin repository's .pth); or the address of
such a file, which is downloaded and cached: https://…, with #sha256=… to pin it. The layout is
detected. Code in a pickle is never run.

`--to ours` writes one safetensors file with its model, its classes and the SHA-256 of its source;
jobs/evaluate.py, jobs/predict.py and init_checkpoint read it. The other layouts are for the other
implementations: `.pth` holds {"model": …} as official and detrex load it. They have no class names
and no configuration.

The tensors show the layout, ResNet or Swin, and the numbers of classes, levels, layers and
channels. --variant gives the rest: number of queries, choice of proposals, image size and
suppression.

A tensor that is missing, unused or of another shape is an error, unless it is allowed by name.
--allow-missing takes names of our model, --allow-unused names of the file; * matches any text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

from tyro.conf import Positional, UseAppendAction

from deta.jobs.command_line import OUTPUT, echo, refuse, run_tool
from deta.jobs.model_options import MODEL_KEYS, read_model_options, require_weights
from deta.platform.run.config import RunConfig, override
from deta.platform.system.atomic_write import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from deta.platform.weights.class_mapping import FileClasses
    from deta.platform.weights.model_file import ModelFile

SUFFIXES = {
    "ours": (".safetensors",),
    "official": (".pth", ".safetensors"),
    "detrex": (".pth", ".safetensors"),
    "huggingface": (".safetensors", ".bin"),
}


@dataclass(frozen=True)
class _Weights:
    """The weights to write."""

    tensors: dict[str, Tensor]  # under our names
    config: RunConfig
    classes: FileClasses | None  # none for a backbone
    source: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    source: Positional[str] = ""  # a file, run or https://…
    # The layout to write; without it, nothing is written.
    to: Literal["ours", "official", "detrex", "huggingface"] | None = None
    out: Annotated[Path | None, OUTPUT] = None  # the file; without it, named by SOURCE, here
    variant: str | None = None  # without it, chosen by the tensors
    # The classes of the rows of SOURCE: annotations in COCO format, a config.json of Hugging Face,
    # or a text file with one name per line.
    classes: Path | None = None
    # Annotations in COCO format: keep their classes, matched by name; new ones are random.
    for_data: Path | None = None
    # How --for-data matches classes.
    init_classes: Literal["by_name", "in_order", "drop"] = "by_name"
    allow_missing: UseAppendAction[tuple[str, ...]] = ()  # our names that may be missing
    allow_unused: UseAppendAction[tuple[str, ...]] = ()  # the file's names that may be unused
    report: Path | None = None  # write the report as JSON
    list: bool = False  # list the published files and exit


def main() -> NoReturn:
    options, changes = read_model_options(ConvertOptions, __doc__, MODEL_KEYS)
    if options.list:
        from deta.platform.weights.published_catalogue import format_catalogue

        echo(format_catalogue())
        raise SystemExit(0)
    if not options.source:
        refuse(ValueError("name a SOURCE, or use --list to see the published files"))
    run_tool(lambda: _prepare(options, changes), lambda weights: _write(weights, options))


def _prepare(options: ConvertOptions, changes: dict[str, str]) -> _Weights:
    require_weights(options.source)
    from deta.platform.system.download import fetch
    from deta.platform.weights.backbone_file import is_backbone
    from deta.platform.weights.weight_files import read_weights
    from deta.platform.weights.weight_parts import is_weights_folder

    if options.to is not None:
        output = _output(options)
        if output.suffix not in SUFFIXES[options.to]:
            raise ValueError(f"{output}: end the name in {' or '.join(SUFFIXES[options.to])}")
        if output.is_dir():
            raise ValueError(f"{output}: is a folder; name the file to write")
    path = fetch(options.source, echo=echo)
    if (path.is_dir() and not is_weights_folder(path)) or path.name == "best":
        from deta.platform.checkpoint.local import find_checkpoint

        path = find_checkpoint(path)
    is_checkpoint = path.is_dir() and not is_weights_folder(path)
    tensors = None if is_checkpoint else read_weights(path, echo)
    source = {"file": path.name, "sha256": _weights_sha256(path)}
    if tensors is not None and is_backbone(tensors):
        return _prepare_backbone(path, tensors, options, source)
    return _prepare_detector(_open(path, tensors, changes, options), options, source)


def _open(
    path: Path,
    tensors: dict[str, Tensor] | None,
    changes: dict[str, str],
    options: ConvertOptions,
) -> ModelFile:
    """Open a detector with the configuration of the named variant, or of the best match."""
    from deta.jobs.recipes import find_variant
    from deta.model.pretrained_anchor import is_anchor_detr
    from deta.platform.weights.class_mapping import listed_classes
    from deta.platform.weights.converted_file import is_converted
    from deta.platform.weights.model_file import identify, open_model_file

    if tensors is None or is_converted(path):
        if options.variant is not None:
            raise ValueError(
                "--variant is for published files; this file holds its own configuration"
            )
        file = open_model_file(path, find_variant("deta_r50"))
    else:
        is_swin = any("relative_position_bias_table" in name for name in tensors)
        likely = "anchor_detr_r50" if is_anchor_detr(tensors) else "deta_r50"
        variant = options.variant or ("deta_swin_l" if is_swin else likely)
        file = identify(path, tensors, find_variant(variant))
        echo(f"variant: {variant}, for everything that the tensors do not show")
    file = replace(file, config=override(file.config, changes))
    if options.classes is not None:
        classes = listed_classes(options.classes, file.classes.num_rows)
        file = replace(file, classes=classes)
    return file


def _prepare_detector(file: ModelFile, options: ConvertOptions, source: dict[str, str]) -> _Weights:
    from deta.platform.inference.image_paths import read_listing
    from deta.platform.weights.conversion_report import (
        adapt_classes,
        compare_with_model,
        complete_state,
    )

    model = file.config.model
    echo(f"layout: {file.layout}, sha256 {source['sha256']}")
    echo(
        f"model: {model.architecture}, backbone {model.backbone.name}, {model.num_classes} "
        f"classes, {model.encoder_layers}+{model.decoder_layers} layers of {model.dim} channels, "
        f"{model.num_queries} queries, logit_eps {model.logit_eps:g}"
    )
    echo(f"classes: {file.classes.origin}\n")
    report = compare_with_model(file, options.allow_missing, options.allow_unused)
    echo(report.table() + "\n")
    if options.report is not None:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.report, vars(report) | {"source": source})
    state, config, classes = complete_state(file, report), file.config, file.classes
    if options.for_data is not None:
        categories, _ = read_listing(options.for_data)
        state, config, classes, plan = adapt_classes(file, state, categories, options.init_classes)
        for line in plan.lines:
            echo(line)
    return _Weights(state, config, classes, source | {"layout": file.layout})


def _prepare_backbone(
    path: Path, tensors: dict[str, Tensor], options: ConvertOptions, source: dict[str, str]
) -> _Weights:
    from deta.jobs.recipes import find_variant
    from deta.platform.weights.backbone_file import rename_backbone
    from deta.platform.weights.weight_files import WeightsError

    try:
        layout, renamed, unused = rename_backbone(tensors)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    echo(f"layout: a backbone of {layout}, sha256 {source['sha256']}")
    echo(f"{len(renamed)} tensors; not used: {', '.join(unused) or 'none'}")
    if options.to not in (None, "ours"):
        raise ValueError(
            f"{path}: holds a backbone alone, which can only be written with --to ours"
        )
    return _Weights(renamed, find_variant("deta_r50"), None, source | {"layout": layout})


def _write(weights: _Weights, options: ConvertOptions) -> int:
    from deta.model.architectures import layouts_of
    from deta.platform.weights.converted_file import write_converted
    from deta.platform.weights.weight_files import write_torch_file, write_weights

    if options.to is None:
        echo("complete; use --to to write it")
        return 0
    output, model = _output(options), weights.config.model
    if weights.classes is None:
        write_weights(output, weights.tensors, {"source": str(weights.source)})
        echo(f"{output}: use it as init_backbone")
        return 0
    if options.to == "ours":
        write_converted(output, weights.tensors, weights.config, weights.classes, weights.source)
        echo(f"{output}: sha256 {_weights_sha256(output)}")
        return 0
    published = layouts_of(model).to_published(weights.tensors, model, options.to)
    if output.suffix == ".safetensors":
        write_weights(output, published)
    else:
        write_torch_file(output, published if options.to == "huggingface" else {"model": published})
    echo(f"{output}: {len(published)} tensors, sha256 {_weights_sha256(output)}")
    for note in _notes(weights.config, options.to):
        echo(note)
    return 0


def _notes(config: RunConfig, layout: str) -> Iterator[str]:
    """Say what the other implementation assumes."""
    rows, eps = config.model.num_classes, config.model.logit_eps
    if layout == "official" and rows != 91:
        yield f"note: official code reads rows as the 91 COCO ids; this file has {rows}"
    if layout == "detrex" and eps != 1e-3:
        yield (
            "note: detrex uses a logit epsilon of 1e-3, these weights were trained with "
            f"{eps:g}; boxes at the border move by up to 1.2e-3 of the image"
        )
    if layout == "huggingface":
        yield (
            f"note: set num_labels={rows}, num_queries={config.model.num_queries} and "
            "two_stage_num_proposals to the same number in its configuration"
        )


def _output(options: ConvertOptions) -> Path:
    if options.out is not None:
        return options.out
    assert options.to is not None
    stem = Path(options.source.partition("#")[0].partition("?")[0]).name
    stem = stem.rpartition(".")[0] if Path(stem).suffix else stem
    kind = "" if options.to == "ours" else f".{options.to}"
    output = Path(f"{stem}{kind}{SUFFIXES[options.to][0]}")
    if output.exists():
        raise ValueError(f"{output}: already exists; choose another with --out")
    return output


def _weights_sha256(path: Path) -> str:
    """Return the hash of weights or of a checkpoint's; empty if there is no such file."""
    from deta.platform.weights.weight_parts import is_weights_folder, weights_sha256

    if path.is_dir() and not is_weights_folder(path):
        path = path / "model.safetensors"
    return weights_sha256(path) if path.exists() else ""


if __name__ == "__main__":
    main()
