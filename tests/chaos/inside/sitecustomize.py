"""Faults inside a training process, only in the processes that a scenario starts.

Python imports this file when it starts with the folder on PYTHONPATH. It does nothing unless
DETA_CHAOS_INSIDE is set, to JSON of

    {"seed": 42, "images": 64, "batch": 4, "epochs": 99,   # to find the step of a batch
     "record": "folder",                                   # for the training data, see below
     "faults": [{"kind": "nan_loss", "rank": 1, "steps": [20, 20]}, …]}

Steps count from 1 as in the journal; `steps` are the first and the last. Kinds: `nan_loss`,
`inf_grad`, `raise`, `sleep` (`seconds`), `exit` (SIGKILL of itself), `slow_read` (the next read of
an image takes `seconds`), `metric` (the AP of the evaluations numbered `calls` is `value`).

"clock" names a file with seconds that are added to the clock, as if somebody had set it. The times
of files stay true.

The product is unchanged: the criterion's call and every optimizer's step are wrapped from
outside. Each process writes `<rank>-<pid>.jsonl` into `record`: a line for each micro-batch
{"step", "rank", "world", "positions", "pixels"} and one for each update {"step", "weights"}, with
hashes of the bytes.
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys

SPEC = json.loads(os.environ.get("DETA_CHAOS_INSIDE") or "null")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules as usual and passes some of them to a function once they are loaded."""

    def __init__(self, changes):
        self.changes = changes
        self.busy = False

    def find_spec(self, name, path=None, target=None):
        if name not in self.changes or self.busy:
            return None
        self.busy = True
        try:
            spec = importlib.machinery.PathFinder.find_spec(name, path)
        finally:
            self.busy = False
        if spec is None or spec.loader is None:
            return None
        change, loader = self.changes[name], spec.loader
        load = loader.exec_module

        def exec_module(module):
            load(module)
            change(module)

        setattr(loader, "exec_module", exec_module)  # noqa: B010  only this module's loader
        return spec


class _Inside:
    def __init__(self, spec):
        self.spec = spec
        self.steps = {}  # seed of a sample -> its position
        self.file = None
        self.step = 0
        self.evaluations = 0
        self.slow_steps = set()

    def positions(self, seeds):
        from deta.platform.data.sample_order import TrainingOrder, sample_seed

        spec = self.spec
        if not self.steps:
            order = TrainingOrder(spec["seed"], spec["images"], spec["batch"])
            for position in range(spec["images"] * spec.get("epochs", 60)):
                key = order.sample_at(position)
                self.steps[sample_seed(spec["seed"], *key)] = position
        return [self.steps.get(seed) for seed in seeds]

    def write(self, **row):
        if not self.spec.get("record"):
            return
        if self.file is None:
            rank = os.environ.get("DETA_CHAOS_RANK", row.get("rank", 0))
            path = f"{self.spec['record']}/{rank}-{os.getpid()}.jsonl"
            self.file = open(path, "a")  # noqa: SIM115  open as long as the process lives
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def rank(self):
        import torch.distributed as dist

        if dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1

    def on_losses(self, batch, losses):
        import hashlib

        positions = self.positions(batch.seeds.tolist())
        known = [position for position in positions if position is not None]
        rank, world = self.rank()
        if known:
            self.step = known[0] // self.spec["batch"] + 1
        self.write(
            step=self.step,
            rank=rank,
            world=world,
            positions=positions,
            pixels=hashlib.sha256(batch.images.cpu().numpy().tobytes()).hexdigest()[:16],
        )
        for fault in self.spec.get("faults", []):
            first, last = fault.get("steps", (0, -1))
            if first <= self.step <= last and fault.get("rank", rank) == rank:
                losses = self.inject(fault, losses)
        return losses

    def inject(self, fault, losses):
        kind = fault["kind"]
        name = next(iter(losses))
        if kind == "nan_loss":
            return losses | {name: losses[name] * float("nan")}
        if kind == "inf_grad":
            bad = losses[name] * 1.0
            bad.register_hook(lambda gradient: gradient * float("inf"))
            return losses | {name: bad}
        if kind == "raise":
            raise RuntimeError(f"a bug that recurs at step {self.step}")
        if kind == "sleep":
            import time

            time.sleep(fault["seconds"])
        if kind == "exit":
            os.kill(os.getpid(), 9)
        return losses

    def on_read(self):
        import time

        for fault in self.spec.get("faults", []):
            first, last = fault.get("steps", (0, -1))
            if (
                fault["kind"] == "slow_read"
                and first <= self.step <= last
                and fault["rank"] == self.rank()[0]
                and self.step not in self.slow_steps
            ):
                self.slow_steps.add(self.step)
                time.sleep(fault["seconds"])

    def on_metrics(self, metrics):
        self.evaluations += 1
        for fault in self.spec.get("faults", []):
            if fault["kind"] == "metric" and self.evaluations in fault["calls"]:
                value = fault["value"]
                return metrics | {"AP": None if value is None else float(value)}
        return metrics

    def on_update(self, optimizer, args, kwargs):
        import hashlib

        digest = hashlib.sha256()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                digest.update(parameter.detach().cpu().numpy().tobytes())
        self.write(step=self.step, rank=self.rank()[0], weights=digest.hexdigest()[:16])

    def change_criterion(self, module):
        for cls in (module.Criterion, module.OneToOneCriterion):
            original = cls.__call__

            def call(this, outputs, batch, num_boxes, original=original):
                return self.on_losses(batch, original(this, outputs, batch, num_boxes))

            cls.__call__ = call
        if self.spec.get("record"):
            from torch.optim.optimizer import register_optimizer_step_post_hook

            register_optimizer_step_post_hook(self.on_update)

    def change_dataset(self, module):
        original = module.CocoDataset.content

        def content(this, index):
            self.on_read()
            return original(this, index)

        module.CocoDataset.content = content

    def change_evaluate(self, module):
        original = module.CocoMetrics.percent
        module.CocoMetrics.percent = lambda this: self.on_metrics(original(this))


def set_clock(file):
    """Let time.time show what it would after somebody set the clock."""
    import time

    true_time, true_time_ns = time.time, time.time_ns

    def offset_s():
        try:
            with open(file) as text:
                return float(text.read() or 0)
        except OSError:
            return 0.0

    time.time = lambda: true_time() + offset_s()
    time.time_ns = lambda: true_time_ns() + int(1e9 * offset_s())


if SPEC is not None:
    if SPEC.get("clock"):
        set_clock(SPEC["clock"])
    inside = _Inside(SPEC)
    sys.meta_path.insert(
        0,
        _Finder(
            {
                "deta.model.criterion": inside.change_criterion,
                "deta.platform.data.coco_dataset": inside.change_dataset,
                "deta.platform.evaluation.coco_metrics": inside.change_evaluate,
            }
        ),
    )
