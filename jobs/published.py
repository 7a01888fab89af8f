"""The published numbers of each system, in the terms of our configuration.

A `Fact` belongs to a key of ours and says what the public code has there and where; where our
recipe has another value on purpose it says why. A `Remark` is a difference that no key expresses.
`DETA.md` is the specification that this project was built from; `official` is jozhang97/DETA or
megvii-research/AnchorDETR, `detrex` is IDEA-Research/detrex.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fact:
    """One number that was published."""

    value: Any  # in the terms of our key; text where our key cannot hold it
    source: str
    why: str = ""  # why ours differs, if it does


@dataclass(frozen=True)
class Remark:
    """A difference that no key of the configuration expresses."""

    published: str
    ours: str
    source: str


@dataclass(frozen=True)
class Published:
    """One published system."""

    system: str
    origin: str  # who published it
    url: str
    ap: str  # box AP on COCO val2017; – where none was published
    facts: Mapping[str, Fact]
    remarks: tuple[Remark, ...]
    weights: str = ""  # address of published weights


def facts(source: str, values: Mapping[str, Any], why: str = "") -> dict[str, Fact]:
    """Several numbers from one place."""
    return {key: Fact(value, source, why) for key, value in values.items()}


DETREX = "https://github.com/IDEA-Research/detrex/tree/main/projects"
DETREX_WEIGHTS = "https://github.com/IDEA-Research/detrex-storage/releases/download"

# What all of them share: official DETA's, Deformable DETR's and Anchor DETR's code are of one root.

_CLASSES_WHY = (
    "classes come from the annotations; the official 91 rows are COCO's ids with gaps, which no "
    "image ever teaches"
)
_COMMON = (
    facts("DETA.md 7.1; official main.py --seed", {"seed": 42})
    | facts(
        "DETA.md 7.1, official main.py: no AMP, no EMA, betas of torch",
        {"precision": "fp32", "ema_decay": None, "optim.betas": (0.9, 0.999)},
    )
    | facts(
        "DETA.md 7.1; official main.py --weight_decay, --clip_max_norm",
        {"optim.weight_decay": 1e-4, "optim.decay_norms": True, "optim.max_grad_norm": 0.1},
    )
    | facts(
        "DETA.md 7.1; StepLR, no warm-up",
        {"schedule.shape": "step", "schedule.lr_drop_factor": 0.1, "schedule.warmup_epochs": 0.0},
    )
    | facts("DETA.md 1; official main.py --num_classes", {"model.num_classes": 91}, _CLASSES_WHY)
    | facts(
        "DETA.md 3.3; official main.py --set_cost_*",
        {
            "criterion.matching_cost.class_": 2.0,
            "criterion.matching_cost.l1": 5.0,
            "criterion.matching_cost.giou": 2.0,
        },
    )
    | facts(
        "DETA.md 4; official main.py --bbox_loss_coef, --giou_loss_coef",
        {"criterion.l1_weight": 5.0, "criterion.giou_weight": 2.0},
    )
    | facts(
        "DETA.md 8; official datasets/coco.py",
        {
            "data.augmentation.short_edges": tuple(range(480, 801, 32)),
            "data.augmentation.max_long_edge": 1333,
            "data.augmentation.flip_probability": 0.5,
            "data.augmentation.crop": True,
            "data.augmentation.crop_pre_short_edges": (400, 500, 600),
            "data.augmentation.crop_min": 384,
            "data.augmentation.crop_max": 600,
            "data.evaluation_size.short_edge": 800,
            "data.evaluation_size.max_long_edge": 1333,
        },
    )
    | facts(
        "DETA.md 1.1; official models/backbone.py",
        {
            "model.backbone.name": "resnet50.tv_in1k",
            "model.backbone.pretrained": True,
            "model.backbone.norm": "frozen",
            "model.backbone.frozen_parts": ("conv1", "bn1", "layer1"),
            "model.backbone.output_norm": False,
            "model.backbone.drop_path": 0.0,
            "model.backbone.dilated": False,
            "model.backbone.checkpoint_activations": False,
        },
    )
    | facts("official README: 8 GPUs", {"cluster.num_workers": 8})
)

_OFFICIAL_REMARKS = (
    Remark(
        "losses are divided by the boxes per worker, at least 1 on each worker",
        "by the boxes of the whole global batch, at least 1 in it; equal where there are as many "
        "boxes as workers",
        "DETA.md 4",
    ),
    Remark(
        "each epoch drops what does not fill a batch; permutation by torch",
        "a batch may straddle two epochs, nothing is dropped; permutation by seed and position",
        "DETA.md 7.1, 8",
    ),
)

# DETA.

_DETA_SIZES = facts(
    "DETA.md 1; official main.py and configs/deta.sh",
    {
        "model.architecture": "deta",
        "model.num_levels": 5,
        "model.dim": 256,
        "model.num_heads": 8,
        "model.num_points": 4,
        "model.encoder_layers": 6,
        "model.decoder_layers": 6,
        "model.ffn_dim": 2048,
        "model.dropout": 0.0,
        "model.num_queries": 900,
    },
)
_DETA_OFFICIAL = (
    _COMMON
    | _DETA_SIZES
    | facts(
        "DETA.md 2; configs/deta.sh --assign_first_stage", {"model.proposal_selection": "spread"}
    )
    | facts("DETA.md 1.7; official util/misc.py", {"model.logit_eps": 1e-5})
    | facts("DETA.md 7; configs/deta.sh --assign_second_stage", {"criterion.assignment": "iou"})
    | facts("DETA.md 4, 7; configs/deta.sh --cls_loss_coef", {"criterion.class_weight": 1.0})
    | facts(
        "DETA.md 3.1, 3.2; official models/assigner.py",
        {
            "criterion.first_stage_iou": 0.7,
            "criterion.second_stage_iou": 0.6,
            "criterion.max_per_object": 4,
            "criterion.exclusive": False,
            "criterion.require_overlap": False,
            "criterion.subsample": True,
        },
    )
    | facts(
        "DETA.md 5; official models/deformable_detr.py",
        {
            "postprocess.nms_iou": 0.7,
            "postprocess.max_candidates": 10_000,
            "postprocess.max_detections": 100,
        },
    )
    | facts(
        "DETA.md 7; official main.py --lr, --lr_backbone, --lr_linear_proj_mult",
        {"optim.lr": 2e-4, "optim.backbone_lr_factor": 0.1, "optim.sampling_lr_factor": 0.1},
    )
    | facts(
        "DETA.md 7; configs/deta.sh --epochs, --lr_drop",
        {"schedule.epochs": 12, "schedule.lr_drop_epochs": (10.0,)},
    )
    | facts("DETA.md 7: 2 per GPU x 8", {"total_batch_size": 16, "micro_batch_size": 2})
)
_ASSIGNER_REMARKS = (
    Remark(
        "positives above the limit are thinned out by torch.randperm",
        "by numbers hashed from each image's seed, the same on any number of workers",
        "DETA.md 3.1, 13",
    ),
    Remark(
        "of two objects that claim one query a GPU decides whose class counts",
        "the later object's class, on every device",
        "DETA.md 3.1",
    ),
)
_ONE_TO_ONE = (
    facts("DETA.md 2, 7: no --assign_first_stage", {"model.proposal_selection": "highest"})
    | facts("DETA.md 3.3, 7: no --assign_second_stage", {"criterion.assignment": "one_to_one"})
    | facts("DETA.md 5, 7: no suppression", {"postprocess.nms_iou": None})
)

# detrex's way with DETA.

_DETREX_EPOCHS_WHY = (
    "90,000 steps of 16 images are 12.17 epochs of COCO train2017, 12.28 of its images that have "
    "objects; the drop comes at ten twelfths of it. Here epochs are whole ones of the data set"
)
_DETREX_CLASSES = facts("DETA.md 1; configs/models/deta_r50.py", {"model.num_classes": 80})
_DETREX_EPS = facts("DETA.md 1.7, 15.4; detrex inverse_sigmoid", {"model.logit_eps": 1e-3})
_DETREX_NO_CLIP = facts("DETA.md 7.2: clipping is off", {"optim.max_grad_norm": None})
_DETREX_DETECTIONS = facts(
    "DETA.md 5; configs/models/deta_r50.py", {"postprocess.max_candidates": 10_000}
)


def _detrex_schedule(source: str, steps: int, drop_step: int, batch: int, why: str) -> dict:
    images_an_epoch = 118_287
    return facts(
        source,
        {
            "schedule.epochs": round(steps * batch / images_an_epoch, 2),
            "schedule.lr_drop_epochs": (round(drop_step * batch / images_an_epoch, 2),),
        },
        why,
    )


_DETREX_12EP = _detrex_schedule(
    "DETA.md 7.2; configs/deta_r50_5scale_12ep.py", 90_000, 75_000, 16, _DETREX_EPOCHS_WHY
)
_DETREX_RUN = (
    facts(
        "detrex configs/common/train.py: no seed is fixed",
        {"seed": "not fixed"},
        "a run must be repeatable; any seed is as good",
    )
    | facts("detrex README: --num-gpus 8", {"cluster.num_workers": 8})
    | facts("detrex configs/common/train.py: amp off", {"precision": "fp32", "ema_decay": None})
)
_DETREX_LOSS = {
    "criterion.l1_weight": 5.0,
    "criterion.giou_weight": 2.0,
    "criterion.matching_cost.class_": 2.0,
    "criterion.matching_cost.l1": 5.0,
    "criterion.matching_cost.giou": 2.0,
}
_DETREX_REMARKS = (
    Remark(
        "images without objects are left out; batches are grouped by aspect ratio",
        "every image counts; no grouping",
        "DETA.md 8",
    ),
    Remark(
        "IoU and GIoU have 1e-6 added below the fraction, in relative units",
        "no such number",
        "DETA.md 12, 15.5",
    ),
    Remark(
        "sizes are rounded, and the maximum is met exactly",
        "sizes as official computes them, within 1 px",
        "DETA.md 8",
    ),
    Remark(
        "boxes are clipped to the image and empty ones dropped before the AP is computed",
        "boxes are evaluated as they come",
        "DETA.md 5",
    ),
    *_OFFICIAL_REMARKS[:1],
)
_DETREX_DETA = (
    _DETA_OFFICIAL
    | _DETREX_CLASSES
    | _DETREX_EPS
    | _DETREX_DETECTIONS
    | _DETREX_12EP
    | _DETREX_RUN
    | facts("DETA.md 4; detrex configs/models/deta_r50.py", _DETREX_LOSS)
    | facts("DETA.md 7.2; configs/deta_r50_5scale_12ep.py", {"total_batch_size": 16})
)
_MODIFIED_TRAINER = _DETREX_NO_CLIP | facts(
    "DETA.md 7.2; projects/deta/train_net.py: the official groups, whatever the configuration says",
    {
        "optim.lr": 2e-4,
        "optim.backbone_lr_factor": 0.1,
        "optim.sampling_lr_factor": 0.1,
        "optim.weight_decay": 1e-4,
        "optim.decay_norms": True,
    },
)
_STEM_FROZEN = facts("DETA.md 7.2: freeze_at=1", {"model.backbone.frozen_parts": ("conv1", "bn1")})
_DEFAULT_TRAINER = _DETREX_NO_CLIP | facts(
    "DETA.md 7.2; detrex configs/common/optim.py: norms are not decayed",
    {
        "optim.lr": 1e-4,
        "optim.backbone_lr_factor": 1.0,
        "optim.sampling_lr_factor": 1.0,
        "optim.weight_decay": 0.1,
        "optim.decay_norms": False,
    },
)

# Swin-L.

_SWIN = (
    facts(
        "DETA.md 1.1; official models/swin.py, configs/deta_swin_ft.sh --backbone swin",
        {
            "model.backbone.name": "swin_large_patch4_window12_384.ms_in22k",
            "model.backbone.norm": "own",
            "model.backbone.frozen_parts": (),
            "model.backbone.output_norm": True,
            "model.backbone.window": 12,
            "model.backbone.drop_path": 0.3,
            "model.backbone.checkpoint_activations": True,
        },
    )
    | facts(
        "DETA.md 8; --bigger in official datasets/coco.py",
        {
            "data.augmentation.short_edges": tuple(range(720, 1201, 48)),
            "data.augmentation.max_long_edge": 2000,
            "data.evaluation_size.short_edge": 1200,
            "data.evaluation_size.max_long_edge": 2000,
        },
    )
    | facts(
        "DETA.md 7; configs/deta_swin_ft.sh --lr, --lr_backbone: 5e-5, 5e-6, 5e-6",
        {"optim.lr": 5e-5},
    )
    | facts(
        "DETA.md 7; configs/deta_swin_ft.sh --epochs, --lr_drop",
        {"schedule.epochs": 24, "schedule.lr_drop_epochs": (20.0,)},
    )
    | facts(
        "DETA.md 7: 1 per GPU x 16",
        {"total_batch_size": 16, "micro_batch_size": 1, "cluster.num_workers": 16},
    )
)
_O365_WEIGHTS = facts(
    "DETA.md 7; official README: weights pre-trained on Objects365, without their class heads",
    {"init_checkpoint": "Objects365 weights"},
    "name them with init_checkpoint=…, a run of o365_pretrain or a published file",
)
_NEW_CLASS_HEADS = facts(
    "DETA.md 7: every key that contains class_embed is dropped", {"init_classes": "drop"}
)
_NOT_PUBLISHED = "not published; deta_swin_pre.sh is missing from the repository"
_ASSUMED = "taken from deta_2x.sh, since the author says that nothing else was changed"

# Anchor DETR.

_ANCHOR = (
    _COMMON
    | facts(
        "official main.py: --enc_layers, --dec_layers, --hidden_dim, --nheads, --dim_feedforward, "
        "--dropout",
        {
            "model.architecture": "anchor_detr",
            "model.dim": 256,
            "model.num_heads": 8,
            "model.encoder_layers": 6,
            "model.decoder_layers": 6,
            "model.ffn_dim": 1024,
            "model.dropout": 0.0,
        },
    )
    | facts(
        "official main.py: --num_query_position, --num_query_pattern, --spatial_prior",
        {"model.num_points": 300, "model.num_patterns": 3, "model.points": "learned"},
    )
    | facts(
        "official models/row_column_decoupled_attention.py: keys are averages over the whole map",
        {"model.average_padding": True},
    )
    | facts("official util/misc.py inverse_sigmoid", {"model.logit_eps": 1e-5})
    | facts("official models/matcher.py: one to one", {"criterion.assignment": "one_to_one"})
    | facts("official main.py --cls_loss_coef", {"criterion.class_weight": 2.0})
    | facts(
        "official models/anchor_detr.py PostProcess: the best 100, nothing suppressed",
        {"postprocess.nms_iou": None, "postprocess.max_detections": 100},
    )
    | facts(
        "official main.py --lr, --lr_backbone: 1e-4, 1e-5",
        {"optim.lr": 1e-4, "optim.backbone_lr_factor": 0.1},
    )
    | facts(
        "official main.py --epochs, --lr_drop",
        {"schedule.epochs": 50, "schedule.lr_drop_epochs": (40.0,)},
    )
    | facts(
        "official main.py --batch_size 1, README: 8 GPUs",
        {"total_batch_size": 8, "micro_batch_size": 1},
    )
)
_DC5 = facts("official main.py --dilation, the default", {"model.backbone.dilated": True})
_R101 = facts("official main.py --backbone", {"model.backbone.name": "resnet101.tv_in1k"})
_DETREX_ANCHOR = (
    _ANCHOR
    | _DETREX_RUN
    | facts(
        "projects/anchor_detr/configs/models/anchor_detr_r50.py",
        {"model.num_classes": 80, "criterion.class_weight": 2.0} | _DETREX_LOSS,
    )
    | facts(
        "projects/anchor_detr/configs/anchor_detr_r50_50ep.py",
        {
            "optim.lr": 1e-4,
            "optim.backbone_lr_factor": 0.1,
            "optim.weight_decay": 1e-4,
            "optim.max_grad_norm": 0.1,
        },
    )
    | facts("detrex inverse_sigmoid", {"model.logit_eps": 1e-3})
    | facts("detrex configs/common/optim.py: norms are not decayed", {"optim.decay_norms": False})
    | facts(
        "projects/anchor_detr/configs/anchor_detr_r50_50ep.py (its README says 64)",
        {"total_batch_size": 16, "micro_batch_size": 2},
    )
    | _detrex_schedule(
        "projects/anchor_detr/configs/anchor_detr_r50_50ep.py",
        375_000,
        300_000,
        16,
        "375,000 steps of 16 images are 50.72 epochs of COCO train2017; the drop comes at four "
        "fifths of it. Here epochs are whole ones of the data set",
    )
)

_DETA_URL = "https://github.com/jozhang97/DETA"
_ANCHOR_URL = "https://github.com/megvii-research/AnchorDETR"
_DETA_REMARKS = _OFFICIAL_REMARKS + _ASSIGNER_REMARKS
_DETREX_DETA_REMARKS = _DETREX_REMARKS + _ASSIGNER_REMARKS

# By recipe and variant. Variants that follow no publication (small, demo) are not here.
PUBLISHED: Mapping[str, Published] = {
    "deta_r50.official_12ep": Published(
        "DETA R50 5-scale",
        "official",
        _DETA_URL,
        "50.1",
        _DETA_OFFICIAL,
        _DETA_REMARKS,
        f"{DETREX_WEIGHTS}/v0.3.0/converted_deta_r50_5scale_12ep.pth",
    ),
    "deta_r50.official_24ep": Published(
        "DETA R50 5-scale, 24 epochs",
        "official",
        _DETA_URL,
        "51.1",
        _DETA_OFFICIAL
        | facts(
            "DETA.md 7; configs/deta_2x.sh --epochs, --lr_drop",
            {"schedule.epochs": 24, "schedule.lr_drop_epochs": (20.0,)},
        ),
        _DETA_REMARKS,
    ),
    "deta_r50.detrex_bs8": Published(
        "DETA R50 5-scale, total batch 8",
        "detrex",
        f"{DETREX}/deta",
        "50.0",
        _DETREX_DETA
        | _DEFAULT_TRAINER
        | _STEM_FROZEN
        | facts(
            "DETA.md 7.2; configs/deta_r50_5scale_12ep_bs8.py",
            {
                "total_batch_size": 8,
                "micro_batch_size": 1,
                "optim.backbone_lr_factor": 0.1,
                "optim.weight_decay": 1e-4,
            },
        )
        | _detrex_schedule(
            "DETA.md 7.2; configs/deta_r50_5scale_12ep_bs8.py",
            180_000,
            150_000,
            8,
            _DETREX_EPOCHS_WHY.replace("90,000 steps of 16", "180,000 steps of 8"),
        ),
        _DETREX_DETA_REMARKS,
        f"{DETREX_WEIGHTS}/v0.4.0/deta_r50_5scale_12ep_bs8.pth",
    ),
    "deta_r50.detrex_bs16": Published(
        "DETA R50 5-scale, total batch 16, default trainer",
        "detrex",
        f"{DETREX}/deta",
        "49.4",
        _DETREX_DETA | _DEFAULT_TRAINER,
        _DETREX_DETA_REMARKS,
    ),
    "deta_r50.detrex_aligned": Published(
        "DETA R50 5-scale, total batch 16, official optimizer",
        "detrex",
        f"{DETREX}/deta",
        "49.9",
        _DETREX_DETA | _MODIFIED_TRAINER,
        _DETREX_DETA_REMARKS,
    ),
    "deta_r50.no_frozen_backbone": Published(
        "DETA R50 5-scale, first stage of the backbone trains",
        "detrex",
        f"{DETREX}/deta",
        "50.2",
        _DETREX_DETA | _MODIFIED_TRAINER | _STEM_FROZEN,
        _DETREX_DETA_REMARKS,
    ),
    "improved_deformable_detr_r50.official_50ep": Published(
        "Improved Deformable DETR R50",
        "official; 49.8 measured by detrex",
        _DETA_URL,
        "49.6 / 49.8",
        _DETA_OFFICIAL
        | _ONE_TO_ONE
        | facts(
            "DETA.md 7; configs/improved_baseline.sh --epochs, --lr_drop",
            {"schedule.epochs": 50, "schedule.lr_drop_epochs": (40.0,)},
        ),
        _OFFICIAL_REMARKS,
        f"{DETREX_WEIGHTS}/v0.3.0/converted_deta_improved_deformable_baseline.pth",
    ),
    "improved_deformable_detr_r50.detrex_12ep": Published(
        "Improved Deformable DETR R50 as detrex's file would train it",
        "detrex",
        f"{DETREX}/deta",
        "–",
        _DETREX_DETA
        | _MODIFIED_TRAINER
        | _ONE_TO_ONE
        | facts("DETA.md 5: select_box_nums_for_evaluation", {"postprocess.max_detections": 300}),
        _DETREX_REMARKS,
    ),
    "deta_swin_l.official_finetune": Published(
        "DETA Swin-L, from Objects365",
        "official",
        _DETA_URL,
        "62.9",
        _DETA_OFFICIAL | _SWIN | _O365_WEIGHTS | _NEW_CLASS_HEADS,
        _DETA_REMARKS,
        f"{DETREX_WEIGHTS}/v0.3.0/converted_deta_swin_o365_finetune.pth",
    ),
    "deta_swin_l.detrex_finetune": Published(
        "DETA Swin-L as detrex's file would train it",
        "detrex",
        f"{DETREX}/deta",
        "–",
        _DETREX_DETA
        | _DEFAULT_TRAINER
        | _SWIN
        | _NEW_CLASS_HEADS
        | _DETREX_12EP
        | facts(
            "DETA.md 7.2; configs/deta_swin_large_finetune_24ep.py",
            {"optim.lr": 5e-5, "optim.backbone_lr_factor": 0.1},
        )
        | facts(
            "DETA.md 1.1; detectron2 SwinTransformer's defaults",
            {
                "model.backbone.drop_path": 0.2,
                "model.backbone.checkpoint_activations": False,
            },
        )
        | facts(
            "DETA.md 7.2: total_batch_size 16, GPUs not said",
            {"total_batch_size": 16, "micro_batch_size": 1, "cluster.num_workers": 16},
        )
        | facts(
            "DETA.md 7.2: an R-50 checkpoint unless it is overridden",
            {"init_checkpoint": "R-50"},
            "an oversight in the file; Swin-L starts from its own weights",
        ),
        _DETREX_DETA_REMARKS,
    ),
    "deta_swin_l.o365_pretrain": Published(
        "DETA Swin-L on Objects365, before the fine-tuning",
        "official",
        _DETA_URL,
        "–",
        _DETA_OFFICIAL
        | _SWIN
        | facts(
            "DETA.md 7: more classes (Hugging Face's converted weights have 366)",
            {"model.num_classes": 366},
            "Objects365 has 365; classes come from the annotations",
        )
        | facts(
            "DETA.md 7 (issue 28 of the official repository): 24 epochs", {"schedule.epochs": 24}
        )
        | facts(
            _NOT_PUBLISHED,
            {
                "optim.lr": "not published",
                "optim.backbone_lr_factor": "not published",
                "optim.sampling_lr_factor": "not published",
                "schedule.lr_drop_epochs": "not published",
                "total_batch_size": "not published",
                "micro_batch_size": "not published",
                "cluster.num_workers": "not published",
            },
            _ASSUMED,
        ),
        _DETA_REMARKS,
    ),
    "anchor_detr_r50.official_r50": Published(
        "Anchor DETR R50 C5",
        "official 42.1; 42.2 measured by detrex",
        _ANCHOR_URL,
        "42.1 / 42.2",
        _ANCHOR,
        _OFFICIAL_REMARKS,
        f"{DETREX_WEIGHTS}/v0.3.0/converted_anchor_detr_r50_50ep.pth",
    ),
    "anchor_detr_r50.official_r50_dc5": Published(
        "Anchor DETR R50 DC5",
        "official 44.3; 44.2 measured by detrex",
        _ANCHOR_URL,
        "44.3 / 44.2",
        _ANCHOR | _DC5,
        _OFFICIAL_REMARKS,
        f"{DETREX_WEIGHTS}/v0.3.0/converted_anchor_detr_r50_dc5_50ep.pth",
    ),
    "anchor_detr_r50.official_r101": Published(
        "Anchor DETR R101 C5",
        "official",
        _ANCHOR_URL,
        "43.5",
        _ANCHOR | _R101,
        _OFFICIAL_REMARKS,
        f"{DETREX_WEIGHTS}/v0.3.0/converted_anchor_detr_r101_50ep.pth",
    ),
    "anchor_detr_r50.official_r101_dc5": Published(
        "Anchor DETR R101 DC5",
        "official",
        _ANCHOR_URL,
        "45.1",
        _ANCHOR | _R101 | _DC5,
        _OFFICIAL_REMARKS,
        f"{DETREX_WEIGHTS}/v0.3.0/converted_anchor_detr_r101_dc5_50ep.pth",
    ),
    "anchor_detr_r50.detrex_r50": Published(
        "Anchor DETR R50 C5",
        "detrex",
        f"{DETREX}/anchor_detr",
        "41.9",
        _DETREX_ANCHOR,
        _DETREX_REMARKS,
        f"{DETREX_WEIGHTS}/v0.3.0/anchor_detr_r50_50ep.pth",
    ),
}
