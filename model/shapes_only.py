"""Builds models that have shapes and no values, in milliseconds and without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

RANDOM = frozenset({Tensor.normal_, Tensor.uniform_})


class _WithoutRandom(TorchFunctionMode):
    """Skips random initial values: for tensors without values, they import the compiler."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return args[0] if func in RANDOM else func(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """Build what is built in the block on the meta device."""
    with torch.device("meta"), _WithoutRandom():
        yield
