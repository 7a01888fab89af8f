"""Find the weights of a detector in what other training code saves, and take wrappers off names.

Training code nests weights under keys (`model`, `state_dict`, `ema`), and wraps models, which puts
parts before or into names: DistributedDataParallel (`module.`), torch.compile (`_orig_mod.`), FSDP,
Lightning (`model.`, `net.`) and torch's AveragedModel (`module.`, and the counter `n_averaged`).

Where raw and averaged weights lie side by side, the averaged ones are taken, since their AP is the
one that is reported. A note says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeGuard

from torch import Tensor

from deta.platform.system.short_list import short_list
from deta.platform.weights.restricted_unpickler import ArrayRecord, Foreign, TensorRecord

Weights = Mapping[str, object]  # names to tensors, or to what is known of them before they are read

# Keys of raw weights, the first existing one is used, and words that mark averaged ones.
RAW = (
    "model", "state_dict", "model_state_dict", "model_state", "module", "net", "network",
    "detector", "online_model", "student", "weights", "params", "blobs",
)  # fmt: skip
AVERAGED = re.compile(r"(^|_)(ema|swa|averaged?|shadow)(_|$)")
# Parts of names that only wrappers add: DistributedDataParallel, torch.compile and FSDP.
INSIDE = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Attributes under which wrappers keep a model, so that all its names begin with one.
AROUND = {"model", "net", "network", "detector", "online_model", "student"}
COUNTERS = {
    "n_averaged", "num_averaged", "num_updates", "updates", "decay", "initted", "step", "steps",
}  # fmt: skip
# Parts of a training module that are not the model.
BESIDE = re.compile(r"criterion|loss(_fn|es)?|matcher|.*metrics?|.*_map|postprocess(ors?)?")


def select_weights(content: object) -> tuple[object, list[str]]:
    """Return the weights in the content of a file, under plain names, and notes on what was chosen.

    Content without a key that is known to hold weights is returned as it is.
    """
    if not isinstance(content, Mapping):
        return content, []
    content = _by_prefix(content)
    averaged = [key for key in content if AVERAGED.search(str(key)) and _holds(content[key])]
    raw = [key for key in RAW if isinstance(content.get(key), Mapping)]
    if not averaged and not raw:
        return _plain_names(content) if _is_flat(content) else (content, [])
    if not averaged:
        return select_weights(content[raw[0]])
    mean, notes = select_weights(content[averaged[0]])
    if not raw:
        return mean, [*notes, f"took the averaged weights, `{averaged[0]}`"]
    plain, raw_notes = select_weights(content[raw[0]])
    if not isinstance(mean, Mapping) or not isinstance(plain, Mapping):
        return plain, raw_notes
    where = f"raw weights (`{raw[0]}`) and averaged ones (`{averaged[0]}`)"
    if not mean.keys() & plain.keys():
        return plain, [*raw_notes, f"of {where} took the raw ones: the others have other names"]
    lacking = [name for name in plain if name not in mean]
    more = f"; {len(lacking)} tensors that these lack are raw" if lacking else ""
    note = f"of {where} took the averaged ones{more}"
    return {**mean, **{name: plain[name] for name in lacking}}, [*notes, note]


def weights_key(content: Mapping[str, object]) -> str | None:
    """Return the key under which weights, or a module with them, lie in a mapping, if in any."""

    def holds(value: object) -> bool:
        return (isinstance(value, Foreign) and value.is_module) or _holds(value)

    averaged = [key for key in content if AVERAGED.search(str(key)) and holds(content[key])]
    return next(iter([*averaged, *(key for key in RAW if holds(content.get(key)))]), None)


def _is_tensor(value: object) -> TypeGuard[TensorRecord | ArrayRecord | Tensor]:
    return isinstance(value, TensorRecord | ArrayRecord | Tensor)


def _is_flat(content: Mapping[str, object]) -> bool:
    return bool(content) and all(map(_is_tensor, content.values()))


def _holds(value: object) -> bool:
    """Return True for names with tensors, also if they lie deeper, as in {"module": …}."""
    if not isinstance(value, Mapping):
        return False
    return any(
        _is_tensor(inner) or ((key in RAW or AVERAGED.search(str(key))) and _holds(inner))
        for key, inner in value.items()
    )


def _by_prefix(content: Mapping[str, object]) -> Mapping[str, object]:
    """Split names such as `model.a` and `ema_model.a` of one list into two."""
    parts: dict[str, dict[str, object]] = {}
    for name, value in content.items():
        first, dot, rest = str(name).partition(".")
        if dot and _is_tensor(value):
            parts.setdefault(first, {})[rest] = value
        elif first not in COUNTERS:
            return content
    models = {part for part in parts if not BESIDE.fullmatch(part)}
    averaged = {part for part in models if AVERAGED.search(part)}
    return dict(parts) if averaged and models - averaged <= AROUND | INSIDE else content


def _plain_names(state: Mapping[str, object]) -> tuple[Mapping[str, object], list[str]]:
    """Take the parts off names that wrappers added; leave counters out."""
    found = {_without_inside(str(name)): value for name, value in state.items()}
    if len(found) < len(state):  # two names would become one
        return dict(state), []
    # Counters stand beside a wrapped model: theirs are the only names without its prefix.
    bare = {name for name in found if name in state and "." not in name}
    left = bare & COUNTERS
    if not all("." in name and _is_wrapped(name) for name in state if name not in left):
        left &= {"n_averaged"}
    while True:
        names = found.keys() - left
        first = {name.partition(".")[0] for name in names}
        beside = {part for part in first if BESIDE.fullmatch(part)}
        around = first - beside
        if len(around) != 1 or not all("." in name for name in names):
            break
        (wrapper,) = around
        if wrapper not in AROUND and not AVERAGED.search(wrapper):
            break
        left |= {name for name in names if name.partition(".")[0] in beside}
        found = {
            name if name in left else name.partition(".")[2]: value for name, value in found.items()
        }
    kept = {name: value for name, value in found.items() if name not in left}
    if left == {"n_averaged"}:
        return kept, ["holds averaged weights, of torch's AveragedModel (left out: n_averaged)"]
    notes = [f"left out {len(left)} that are not the model's: {short_list(sorted(left))}"]
    return kept, notes * bool(left)


def _is_wrapped(name: str) -> bool:
    first = name.partition(".")[0]
    return first in INSIDE | AROUND or AVERAGED.search(first) is not None


def _without_inside(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in INSIDE) or name
