"""Test `converted_file.py`: any change of a file is detected."""

from __future__ import annotations

import pytest
import torch

from deta.platform.run.config import RunConfig
from deta.platform.weights.class_mapping import published_classes
from deta.platform.weights.converted_file import is_converted, read_converted, write_converted


def test_any_flipped_bit_is_detected(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.randn(40), "b": torch.arange(9)}
    write_converted(path, tensors, RunConfig(), published_classes(3), {"file": "x.pth"})
    assert is_converted(path)
    for name, tensor in read_converted(path).tensors.items():
        assert torch.equal(tensor, tensors[name])
    content = path.read_bytes()
    # The library writes the header's keys in any order, so which byte a place holds differs from
    # one run to the next. What no digest covers is tried at each of its bytes and bits.
    framework = content.index(b'"format":"pt"') + len(b'"format":"')
    places = range(0, len(content), 23)
    flips = [(place, place % 8) for place in places]
    flips += [(framework + byte, bit) for byte in (0, 1) for bit in range(8)]
    for place, bit in flips:
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            read_converted(path)
