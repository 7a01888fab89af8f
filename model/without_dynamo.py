"""Imports torchvision and timm, and uses optimizers, without `torch._dynamo`.

Importing it takes as long as importing torch: two seconds in each process of a training. All that
these three need of it is to keep some functions out of compiled code. So here they get a stand-in,
whose functions import it when they are called in earnest. A model that is compiled imports it as
ever.

Import this file before torchvision or timm.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch._compile import _disable_dynamo
from torch.optim import Optimizer


def _is_compile_supported(device: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return is_compile_supported(device)


def _disable(
    function: Callable[..., Any] | None = None, recursive: bool = True, **_: object
) -> Callable[..., Any]:
    return _disable_dynamo(function, recursive)  # torch's own, which imports at the first call


def _import_vision() -> None:
    dynamo, utils = ModuleType("torch._dynamo"), ModuleType("torch._dynamo.utils")
    dynamo.disable = _disable  # type: ignore[attr-defined]  # for timm.models.naflexvit
    utils.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]  # roi_align
    stand_ins = {module.__name__: module for module in (dynamo, utils)}
    sys.modules |= stand_ins
    try:
        import timm  # noqa: F401
        import torchvision.transforms.v2  # noqa: F401
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _exempt_optimizers() -> None:
    """Mark the methods of optimizers as disabled already. No optimizer is compiled here."""
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        method = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if method is not None:
            method.__dict__.setdefault("__dynamo_disable", method)


if "torch._dynamo" not in sys.modules:
    _import_vision()
    _exempt_optimizers()
