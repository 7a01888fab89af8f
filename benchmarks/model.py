#!/usr/bin/env python
"""Compare the complete DETA R50 5-scale, ours and Hugging Face's, with the same weights.

  python benchmarks/model.py [--threads 2] [--size 800 1066] [--bf16] [--profile]

Needs `pip install transformers==4.57.6`, preferably in a separate environment. A training step is
the forward pass in training mode, all losses and the backward pass, with eight objects. Rounds are
interleaved, and the median counts. Both must give the same boxes and losses before they are timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from measuring import peak_memory, processor, timed
from torch import Tensor
from transformers.models.deprecated.deta import DetaConfig, DetaForObjectDetection

from deta.model.batch import Target, pad_batch
from deta.model.config import BackboneConfig, CriterionConfig, ModelConfig
from deta.model.criterion import Criterion
from deta.model.detector import DETA
from deta.model.pretrained import to_published
from deta.ops.ms_deform_attn import path

CPU = torch.device("cpu")
NUM_OBJECTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--size", type=int, nargs=2, action="append", metavar=("H", "W"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="also time ours under autocast")
    parser.add_argument("--profile", action="store_true", help="profile our training step")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    torch.manual_seed(0)
    config = ModelConfig(backbone=BackboneConfig(pretrained=False), num_classes=91)
    ours = DETA(config)
    for head in ours.box_heads:  # they start at zero, which makes every box its reference
        torch.nn.init.normal_(head.mlp[-1].weight, std=0.02)  # type: ignore[arg-type]
    theirs = huggingface_model(ours, config)
    print(f"{processor()}, {arguments.threads} threads, PyTorch {torch.__version__}")
    print(f"our operator: {path('cpu')}\n")
    print("| image | pass | | seconds | ratio | peak memory MB | ratio |")
    print("|---|---|---|---|---|---|---|")
    for size in arguments.size or [(480, 640), (800, 1066)]:
        compare(ours, theirs, tuple(size), arguments.repeats, arguments.bf16)
    if arguments.profile:
        profile(ours, tuple(arguments.size[0]) if arguments.size else (480, 640))


def huggingface_model(ours: DETA, config: ModelConfig) -> torch.nn.Module:
    """Build the same network with the same weights, as published rather than by default."""
    theirs = DetaForObjectDetection(
        DetaConfig(
            num_queries=900,
            two_stage_num_proposals=900,
            encoder_ffn_dim=2048,
            decoder_ffn_dim=2048,
            dropout=0.0,
            auxiliary_loss=True,
            class_cost=2,
            num_labels=91,
            with_box_refine=True,
            two_stage=True,
            assign_first_stage=True,
            assign_second_stage=True,
            num_feature_levels=5,
        )
    )
    theirs.load_state_dict(to_published(ours.state_dict(), config, "huggingface"))
    for name, parameter in theirs.named_parameters():  # freeze the same weights as ours
        parameter.requires_grad_("backbone" not in name or "stages.0" not in name)
    return theirs


def compare(
    ours: DETA, theirs: torch.nn.Module, size: tuple[int, int], repeats: int, bf16: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(3, *size, generator=generator)
    boxes = torch.rand(NUM_OBJECTS, 4, generator=generator) * 0.3 + torch.tensor([0.3, 0.3, 0, 0])
    labels = torch.randint(1, 91, (NUM_OBJECTS,), generator=generator)
    batch = pad_batch([image], [Target(boxes, labels)], [0])
    criterion = Criterion(CriterionConfig(), ours.config.num_queries)
    annotations = [{"class_labels": labels, "boxes": boxes}]

    def our_forward() -> Tensor:
        ours.eval()
        with torch.no_grad():
            return ours(batch.images, batch.padding).boxes[-1]

    def their_forward() -> Tensor:
        theirs.eval()
        with torch.no_grad():
            return theirs(image[None], pixel_mask=torch.ones(1, *size)).pred_boxes

    def our_step() -> float:
        ours.train()
        ours.zero_grad(set_to_none=True)
        losses = criterion(
            ours(batch.images, batch.padding), batch, torch.tensor(float(NUM_OBJECTS))
        )
        total = criterion.total(losses)
        total.backward()
        return total.item()

    def their_step() -> float:
        theirs.train()
        theirs.zero_grad(set_to_none=True)
        total = theirs(image[None], pixel_mask=torch.ones(1, *size), labels=annotations).loss
        total.backward()
        return total.item()

    def in_bf16(call: Callable[[], object]) -> Callable[[], object]:
        def lowered() -> object:
            with torch.autocast("cpu", torch.bfloat16):
                return call()

        return lowered

    # Queries with exactly equal scores may be in another order.
    found, expected = our_forward()[0], their_forward()[0]
    off = float(torch.cdist(found, expected, p=1).min(1).values.median())
    assert off < 1e-4, f"boxes differ by {off:.1e}"
    for name, mine, other in (
        ("forward", our_forward, their_forward),
        ("training step", our_step, their_step),
    ):
        calls: dict[str, Callable[[], object]] = {"Hugging Face": other, "ours": mine}
        if bf16:
            calls["ours, bfloat16 autocast"] = in_bf16(mine)
        results = {label: call() for label, call in calls.items()}
        if name == "training step":
            loss, expected_loss = results["ours"], results["Hugging Face"]
            assert abs(loss - expected_loss) < 1e-2 * expected_loss, (loss, expected_loss)  # type: ignore[operator]
        memory = {label: peak_memory(call, CPU) for label, call in calls.items()}
        seconds: dict[str, list[float]] = {label: [] for label in calls}
        for _ in range(repeats):
            for label, call in calls.items():
                seconds[label].append(timed(call, CPU))
        base = statistics.median(seconds["Hugging Face"])
        for label in calls:
            median = statistics.median(seconds[label])
            print(
                f"| {size[0]} × {size[1]} | {name} | {label} | {median:.2f} | {base / median:.2f}× "
                f"| {memory[label] / 1e6:.0f} | {memory[label] / memory['Hugging Face']:.2f}× |",
                flush=True,
            )


def profile(ours: DETA, size: tuple[int, int]) -> None:
    batch = pad_batch(
        [torch.randn(3, *size)], [Target(torch.full((1, 4), 0.5), torch.tensor([1]))], [0]
    )
    criterion = Criterion(CriterionConfig(), ours.config.num_queries)
    ours.train()
    with torch.profiler.profile() as recorded:
        losses = criterion(ours(batch.images, batch.padding), batch, torch.tensor(1.0))
        criterion.total(losses).backward()
    print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


if __name__ == "__main__":
    main()
