"""List published weights and their addresses. No publisher of these states a SHA-256."""

from __future__ import annotations

from dataclasses import dataclass

_DETREX = "https://github.com/IDEA-Research/detrex-storage/releases/download"
_HUB = "https://huggingface.co"


@dataclass(frozen=True)
class PublishedFile:
    """A published file of weights."""

    name: str
    url: str
    layout: str
    ap: float | None  # box AP on COCO val2017 as published, in 0..100
    note: str = ""
    is_page: bool = False  # the address is a page for a browser, not the file


# Sources: the READMEs of jozhang97/DETA, detrex projects/deta, detectron2 MODEL_ZOO.md and
# microsoft/Swin-Transformer, and the file lists of the Hugging Face repositories that they name.
PUBLISHED_FILES = (
    PublishedFile(
        "DETA R50 12 epochs, bs 8",
        f"{_DETREX}/v0.4.0/deta_r50_5scale_12ep_bs8.pth", "detrex", 50.0,
    ),
    PublishedFile(
        "DETA R50 12 epochs, bs 16",
        f"{_DETREX}/v0.4.0/deta_r50_5scale_12ep_hacked_trainer.pth", "detrex", 49.9,
    ),
    PublishedFile(
        "DETA R50 12 epochs, no frozen backbone",
        f"{_DETREX}/v0.4.0/deta_r50_5scale_12ep_no_freeze_backbone.pth", "detrex", 50.2,
    ),
    PublishedFile(
        "DETA R50 12 epochs",
        f"{_DETREX}/v0.3.0/converted_deta_r50_5scale_12ep.pth", "detrex", 50.1,
        "official weights, so add model.logit_eps=1e-5",
    ),
    PublishedFile(
        "Improved Deformable DETR R50 50 epochs",
        f"{_DETREX}/v0.3.0/converted_deta_improved_deformable_baseline.pth", "detrex", 49.8,
        "official weights, so add model.logit_eps=1e-5 model.proposal_selection=highest",
    ),
    PublishedFile(
        "DETA Swin-L 24 epochs from Objects365",
        f"{_DETREX}/v0.3.0/converted_deta_swin_o365_finetune.pth", "detrex", 62.9,
        "official weights, so add model.logit_eps=1e-5",
    ),
    PublishedFile(
        "DETA R50 12 epochs",
        "https://drive.google.com/file/d/1fBQX6GAv_7OvNJaHaebwXAYrgktzeTUQ/view",
        "official", 50.1, is_page=True,
    ),
    PublishedFile(
        "DETA R50 24 epochs",
        "https://drive.google.com/file/d/1XDVXNIDyUFybWvMI8diWuo-gu_7saArO/view",
        "official", 51.1, is_page=True,
    ),
    PublishedFile(
        "Improved Deformable DETR R50 50 epochs",
        "https://drive.google.com/file/d/1Xa-KPL68fx3kura6W6l8D55walXCa62m/view",
        "official", 49.6, is_page=True,
    ),
    PublishedFile(
        "DETA Swin-L 24 epochs from Objects365",
        f"{_HUB}/jozhang97/deta-swin-l/resolve/main/deta_swin_ft.pth", "official", 62.9,
        "2.6 GB, with the optimizer",
    ),
    PublishedFile(
        "DETA Swin-L on Objects365, to fine-tune",
        f"{_HUB}/jozhang97/deta-swin-l-o365/resolve/main/deta_swin_pt_o365.pth", "official", None,
        "366 classes without names: use init_classes=drop",
    ),
    PublishedFile(
        "DETA R50 12 epochs",
        f"{_HUB}/jozhang97/deta-resnet-50/resolve/main/model.safetensors", "huggingface", None,
    ),
    PublishedFile(
        "DETA R50 24 epochs",
        f"{_HUB}/jozhang97/deta-resnet-50-24-epochs/resolve/main/model.safetensors",
        "huggingface", None,
    ),
    PublishedFile(
        "DETA Swin-L 24 epochs from Objects365",
        f"{_HUB}/jozhang97/deta-swin-large/resolve/main/model.safetensors", "huggingface", None,
    ),
    PublishedFile(
        "DETA Swin-L on Objects365, to fine-tune",
        f"{_HUB}/jozhang97/deta-swin-large-o365/resolve/main/model.safetensors",
        "huggingface", None, "366 classes: use init_classes=drop",
    ),
    PublishedFile(
        "ResNet-50, ImageNet",
        "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/torchvision/R-50.pkl",
        "detectron2", None, "a backbone: init_backbone",
    ),
    PublishedFile(
        "ResNet-50, ImageNet",
        "https://download.pytorch.org/models/resnet50-0676ba61.pth",
        "torchvision", None, "a backbone: init_backbone",
    ),
    PublishedFile(
        "Swin-L 384, ImageNet-22k",
        "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
        "swin_large_patch4_window12_384_22k.pth",
        "swin", None, "a backbone: init_backbone",
    ),
)  # fmt: skip


def format_catalogue() -> str:
    """Return the list of published files as text."""
    lines = []
    for file in PUBLISHED_FILES:
        ap = f", AP {file.ap}" if file.ap is not None else ""
        page = " (a page: download it with a browser and give the file's path)"
        lines.append(f"{file.name}{ap}, {file.layout} layout{page if file.is_page else ''}")
        lines.append(f"  {file.url}")
        if file.note:
            lines.append(f"  {file.note}")
    lines.append(
        "\nNo publisher states a SHA-256 of these. The first download prints it: append it to the "
        "address as\n#sha256=… so that later downloads give the same bytes or an error."
    )
    return "\n".join(lines)
