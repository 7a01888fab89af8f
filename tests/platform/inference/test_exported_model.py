"""Images are packed for an exported file, and its output becomes detections."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from deta.platform.data.image_sizes import EvaluationSize
from deta.platform.inference.exported_model import open_program, pack_images, unpack_detections


def test_images_are_packed_at_the_top_left():
    grey = [Image.new("RGB", (40, 20), (200, 200, 200)), Image.new("RGB", (30, 60), (9, 9, 9))]

    packed = pack_images(grey, EvaluationSize(short_edge=10, max_long_edge=16), least_side_px=18)

    assert packed.sizes_px.tolist() == [[8, 16], [16, 8]]
    assert packed.original_sizes_px.tolist() == [[20, 40], [60, 30]]
    assert packed.images.shape == (2, 3, 18, 18)
    assert packed.images[0].sum() == 3 * 8 * 16 * 200
    assert (packed.images[1, :, :16, :8] == 9).all()


def test_a_program_is_opened_and_the_padding_of_its_output_is_left_out(tmp_path):
    class Finding(nn.Module):
        def forward(
            self, images: Tensor, sizes_px: Tensor, original_sizes_px: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            labels = torch.tensor([[4, 2, -1], [3, -1, -1]])
            boxes_px = original_sizes_px[:, None].repeat(1, 3, 2).float()
            return images[:, 0, 0, :3].float() / 255, labels, boxes_px

    packed = pack_images(
        [Image.new("RGB", (8, 9), (51, 0, 0))] * 2, EvaluationSize(short_edge=8), 1
    )
    program = torch.export.export(Finding(), tuple(packed))
    torch.export.save(program, tmp_path / "model.pt2")

    first, second = unpack_detections(*open_program(tmp_path / "model.pt2")(packed))

    assert first.scores.tolist() == pytest.approx([0.2, 0.2])
    assert first.labels.tolist() == [4, 2]
    assert second.boxes_px.tolist() == [[9, 8, 9, 8]]
