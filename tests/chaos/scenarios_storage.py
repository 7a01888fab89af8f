"""B: the disk is full, read-only or corrupt; saves are interrupted."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.chaos import oracles
from tests.chaos.direct import Direct, undisturbed
from tests.chaos.runs import Place, TinyRun, expect, log_progress
from tests.chaos.saves import SaveLoop
from tests.chaos.scenario import Options, Outcome
from tests.chaos.scenarios_processes import same_as_undisturbed

SAVE_BYTES = 96 * 2**20  # size of the state that B1 and B10 save repeatedly


def killed_while_saving(place: Place, options: Options) -> Outcome:
    """B1: SIGKILL at a random moment of a save, repeatedly in one folder."""
    times = options.times(20)
    chance = random.Random("b1")
    unloadable = lost = left = 0
    worst_bytes = 0
    with SaveLoop(place.folder / "b1", SAVE_BYTES) as saves:
        for _ in range(times):
            acknowledged = saves.run_and_kill(chance)
            left += bool(oracles.leftovers(saves.folder.parent))
            found = saves.newest_step()
            unloadable += found is None and acknowledged > 0
            lost += found is not None and found < acknowledged
            worst_bytes = max(worst_bytes, oracles.folder_bytes(saves.folder))
    place.shared["b1"] = (times, left, worst_bytes)
    return Outcome(
        f"{unloadable}/{times}", "unloadable", unloadable == 0 and lost == 0,
        f"{lost} acknowledged saves lost; {left} kills left something unfinished",
    )  # fmt: skip


def leftovers_cleaned(place: Place, options: Options) -> Outcome:
    """B10: the leftovers of killed saves are gone after a restart, and disk use is bounded."""
    times = options.times(8)
    chance = random.Random("b10")
    with SaveLoop(place.folder / "b10", SAVE_BYTES // 4) as saves:
        kills_with_leftovers = 0
        for _ in range(times):
            saves.run_and_kill(chance)
            kills_with_leftovers += bool(oracles.leftovers(saves.folder.parent))
        saves.run_and_stop()
        rest = oracles.leftovers(saves.folder.parent)
        one = oracles.folder_bytes(oracles.newest_checkpoint(saves.folder.parent) or saves.folder)
        checkpoints = oracles.folder_bytes(saves.folder) / one
    expect(checkpoints <= 3.05, f"{checkpoints:.1f} checkpoints on disk after {times} kills")
    return Outcome(
        len(rest), "leftovers after the restart", not rest,
        f"{kills_with_leftovers} of {times} kills left one; {checkpoints:.1f} checkpoints of disk",
    )  # fmt: skip


def disk_full(place: Place, options: Options) -> Outcome:
    """B2: a tmpfs is filled while the run trains, and emptied again."""
    with (
        mounted_tmpfs(place.folder / "b2", "64m") as disk,
        TinyRun(
            place, "b2", storage=disk, record=True, schedule__epochs=12,
            evaluate_every_epochs=12, checkpoint__every_steps=5,
            environment={"MLFLOW_TRACKING_URI": f"sqlite:///{place.folder}/b2-mlflow.db"},
        ) as run,
    ):  # fmt: skip
        run.start()
        run.wait_for_step(12)
        ballast = disk / "ballast"
        _fill(ballast)
        at_step = _steps_done(run)
        log_progress(f"b2: full at step {at_step}")
        # The journal cannot be written either; the workers' records show that they continue.
        run.wait_for("20 more steps", lambda: _steps_done(run) >= at_step + 20, 120)
        assert run.process is not None
        expect(run.process.poll() is None, "the run ended on a full disk")
        ballast.unlink()
        freed_s = time.time()
        run.wait_for(
            "a checkpoint after the disk has space again",
            lambda: any(e["kind"] == "checkpoint" and e["time_s"] > freed_s for e in run.events()),
            90,
        )
        saved_s = time.time() - freed_s
        run.finish()
        alarms = [e for e in run.events() if e["kind"] == "checkpoint_failed"]
        restarts = sum(e["kind"] == "restart" for e in run.events())
        same_as_undisturbed(place, run, 12)
        code, _, text = run.again(resume=True)
        expect(code == 2 and "finished" in text, f"a rerun: exit code {code}: {text[-300:]}")
    expect(alarms, "no alarm was written")
    return Outcome(
        round(saved_s, 1), "s from space to save", restarts == 0,
        f"{len(alarms)} alarms; training continued, {restarts} restarts, 0 manual steps, "
        "no journal row lost; bit-equal",
    )  # fmt: skip


def _steps_done(run: TinyRun) -> int:
    return max(oracles.weights_by_rank(run.records), default=0)


def disk_read_only(place: Place, options: Options) -> Outcome:
    """B3: a disk reports an error and turns read-only, as ext4 does; then it is repaired."""
    with ext4_image(place.folder, "b3") as disk:
        uri = f"sqlite:///{place.folder}/b3-mlflow.db"
        with TinyRun(
            place, "b3", storage=disk.folder, schedule__epochs=8, evaluate_every_epochs=8,
            checkpoint__every_steps=5, environment={"MLFLOW_TRACKING_URI": uri},
        ) as run:  # fmt: skip
            run.start()
            run.wait_for_step(12)
            broken_s = time.time()
            disk.break_it()
            log_progress("b3: read-only")
            code = run.wait(300)
            took_s = time.time() - broken_s
            output = run.tail(3000)
        disk.repair()
        with TinyRun(
            place, "b3", storage=disk.folder, schedule__epochs=8, evaluate_every_epochs=8,
            checkpoint__every_steps=5, environment={"MLFLOW_TRACKING_URI": uri},
        ) as run:  # fmt: skip
            run.start(resume=True)
            run.finish()
            same_as_undisturbed(place, run, 8)
    expect(code == 1, f"exit code {code}")
    expect("read-only" in output.lower(), f"no message names the cause: {output[-500:]}")
    expect("--resume" in output, f"no message says how to continue: {output[-500:]}")
    return Outcome(
        round(took_s, 1), "s until it stopped", True,
        "named the cause and how to continue; resumed after the repair, bit-equal",
    )  # fmt: skip


def damaged_newest(place: Place, options: Options) -> Outcome:
    """B4: a file of the newest checkpoint is truncated; the checkpoint before it is used."""
    return _damage(place, options.times(20), _truncate, "b4", "fell back")


def bit_flipped(place: Place, options: Options) -> Outcome:
    """B5: one bit of the newest checkpoint is flipped, anywhere."""
    return _damage(place, options.times(200), _flip, "b5", "detected")


def files_missing(place: Place, options: Options) -> Outcome:
    """B6: a file, or all files, or the folder of the newest checkpoint is missing."""
    return _damage(place, options.times(12), _remove, "b6", "fell back")


def _damage(
    place: Place, times: int, damage: Callable[[Path, random.Random], None], name: str, unit: str
) -> Outcome:
    from deta.platform.checkpoint.local import newest_checkpoint

    clean = undisturbed(place)
    newest = oracles.newest_checkpoint(clean.folder)
    chance = random.Random(name)
    good, slowest_s = 0, 0.0
    folder = place.folder / name / "checkpoints"
    steps = sorted((clean.folder / "checkpoints").glob("step-*"))
    expect(newest == steps[-1] and len(steps) > 1, f"checkpoints: {[p.name for p in steps]}")
    for _ in range(times):
        shutil.rmtree(folder, ignore_errors=True)
        # Linked, not copied: damage replaces a file.
        shutil.copytree(clean.folder / "checkpoints", folder, copy_function=os.link)
        damage(folder / steps[-1].name, chance)
        messages: list[str] = []
        began_s = time.monotonic()
        found = newest_checkpoint(folder, messages.append)
        slowest_s = max(slowest_s, time.monotonic() - began_s)
        reported = bool(messages) or not (folder / steps[-1].name).exists()
        good += found is not None and found.path.name == steps[-2].name and reported
    # And once in a complete run: it continues from the checkpoint before, to the same result.
    run = Direct(place, f"{name}-run")
    shutil.copytree(clean.folder / "checkpoints", run.folder / "checkpoints")
    damage(run.folder / "checkpoints" / steps[-1].name, chance)
    run.finish(2)
    expect(run.weights() == clean.weights(), "continued, but to other weights")
    return Outcome(
        f"{good}/{times}", unit, good == times,
        f"slowest check {slowest_s:.2f} s; the run continues to bit-equal weights",
    )  # fmt: skip


def _truncate(checkpoint: Path, chance: random.Random) -> None:
    file = chance.choice(sorted(checkpoint.iterdir()))
    content = file.read_bytes()
    _replace(file, content[: chance.randrange(len(content))])


def _flip(checkpoint: Path, chance: random.Random) -> None:
    files = sorted(checkpoint.iterdir())
    # Weighted by size: most flips hit tensors, as they would on a disk, and some the small files.
    weights = [file.stat().st_size + 2000 for file in files]
    (file,) = chance.choices(files, weights)
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    _replace(file, bytes(content))


def _replace(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


def _remove(checkpoint: Path, chance: random.Random) -> None:
    what = chance.randrange(6)
    files = sorted(checkpoint.iterdir())
    if what == 5:
        shutil.rmtree(checkpoint)
        if chance.random() < 0.5:
            checkpoint.mkdir()
    else:
        files[what % len(files)].unlink()


def state_files_empty(place: Place, options: Options) -> Outcome:
    """B7: all files besides checkpoints are empty or truncated, also Ray's record of the run."""
    damages: list[tuple[str, Callable[[bytes], bytes]]] = [
        ("empty", lambda content: b""),
        ("truncated", lambda content: content[: len(content) // 2]),
    ]
    with TinyRun(place, "b7") as run:
        run.start()
        run.wait_for_step(12)
        run.signal(signal.SIGTERM)
        expect(run.wait() == 143, f"exit code of a stopped run: {run.tail()}")
        run.family.wait_until_gone(30)
        files = [
            path
            for path in run.folder.rglob("*")
            if path.is_file()
            and "checkpoints" not in path.relative_to(run.folder).parts
            and path.suffix in (".json", ".jsonl", ".lock", ".pickle", ".pkl")
        ]
        log_progress(f"b7: {sorted(str(path.relative_to(run.folder)) for path in files)}")
        for number, (kind, damage) in enumerate(damages):
            for path in files:
                if path.exists():
                    path.write_bytes(damage(path.read_bytes()))
            log_progress(f"b7: all of them {kind}")
            run.start(resume=True)
            if number < len(damages) - 1:
                run.wait_for_step(run.step() + 12)
                run.signal(signal.SIGTERM)
                expect(run.wait() == 143, f"{kind}: {run.tail()}")
                run.family.wait_until_gone(30)
        run.finish()
        expect(
            oracles.weights_sha256(run.folder) == undisturbed(place).weights(),
            "continued, but to other weights",
        )
    count = len(files) * len(damages)
    return Outcome(
        f"{count}/{count}", "rebuilt", True, f"{len(files)} files, all empty, then all truncated"
    )


@contextlib.contextmanager
def mounted_tmpfs(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    _command("mount", "-t", "tmpfs", "-o", f"size={size}", "chaos", str(folder))
    try:
        yield folder
    finally:
        _unmount(folder)


class _Disk:
    """An ext4 file system in a file, behind a loop device."""

    def __init__(self, image: Path, folder: Path) -> None:
        self.image, self.folder = image, folder

    def mount(self) -> None:
        _command("mount", "-o", "loop,errors=remount-ro", str(self.image), str(self.folder))

    def break_it(self) -> None:
        """Trigger a file system error, after which the kernel refuses to write."""
        source = _command("findmnt", "-no", "SOURCE", str(self.folder)).strip()
        Path(f"/sys/fs/ext4/{Path(source).name}/trigger_fs_error").write_text("1\n")

    def repair(self) -> None:
        _unmount(self.folder)
        subprocess.run(["fsck.ext4", "-fy", str(self.image)], capture_output=True, check=False)
        self.mount()


@contextlib.contextmanager
def ext4_image(folder: Path, name: str) -> Iterator[_Disk]:
    disk = _Disk(folder / f"{name}.img", folder / name)
    disk.folder.mkdir(parents=True, exist_ok=True)
    with disk.image.open("wb") as file:
        file.truncate(128 * 2**20)
    _command("mkfs.ext4", "-q", str(disk.image))
    disk.mount()
    try:
        yield disk
    finally:
        _unmount(disk.folder)


def _fill(ballast: Path) -> None:
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * size)


def _command(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    expect(done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip()} (needs root)")
    return done.stdout


def _unmount(folder: Path) -> None:
    for _ in range(40):  # a process may still have a file open
        if subprocess.run(["umount", str(folder)], capture_output=True).returncode == 0:
            return
        time.sleep(0.25)
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)
