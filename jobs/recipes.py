"""All training recipes by name, for jobs that take a variant."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import ModuleType

from deta.jobs import anchor_detr_r50, deta_r50, deta_swin_l, improved_deformable_detr_r50
from deta.platform.run.config import RunConfig

# By the name of the file in jobs/.
RECIPES: Mapping[str, ModuleType] = {
    "deta_r50": deta_r50,
    "improved_deformable_detr_r50": improved_deformable_detr_r50,
    "deta_swin_l": deta_swin_l,
    "anchor_detr_r50": anchor_detr_r50,
}
# Recipe and variant, such as deta_r50.official_12ep.
VARIANTS: Mapping[str, Callable[[], RunConfig]] = {
    f"{recipe}.{variant}": make
    for recipe, module in RECIPES.items()
    for variant, make in module.VARIANTS.items()
}


def find_variant(name: str) -> RunConfig:
    """Return the configuration of a variant.

    Args:
        name: `recipe.variant`; `recipe` alone, for its first variant; or a variant that only one
            recipe has.

    Raises:
        ValueError: there is no such variant, or more than one; suggests the nearest.
    """
    if name in VARIANTS:
        return VARIANTS[name]()
    if name in RECIPES:
        return next(iter(RECIPES[name].VARIANTS.values()))()
    meant = [full for full in VARIANTS if full.partition(".")[2] == name]
    if len(meant) == 1:
        return VARIANTS[meant[0]]()
    near = meant or difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.3) or list(VARIANTS)
    kind = "several recipes have" if meant else "there is no"
    raise ValueError(f"{kind} variant {name!r}; did you mean {' or '.join(near)}?")
