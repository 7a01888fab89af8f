"""B: the disk is full, read-only or lies; saves are cut short."""

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
from tests.chaos.runs import Place, TinyRun, expect, say
from tests.chaos.saves import SaveLoop
from tests.chaos.scenario import Options, Outcome
from tests.chaos.scenarios_processes import same_as_undisturbed

SAVE_BYTES = 96 * 2**20  # of the state that B1 and B10 save again and again


def killed_while_saving(place: Place, options: Options) -> Outcome:
    """B1: SIGKILL at a random moment of a save, again and again, in one folder."""
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
    """B10: what killed saves leave is gone once the run goes on, and the disk's use is bounded."""
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
    """B2: a tmpfs of our own is filled while the run trains, and emptied again."""
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
        say(f"b2: full at step {at_step}")
        # The journal cannot be written either: the workers' records show that they go on.
        run.wait_for("20 steps more", lambda: _steps_done(run) >= at_step + 20, 120)
        assert run.process is not None
        expect(run.process.poll() is None, "the run ended on a full disk")
        ballast.unlink()
        freed_s = time.time()
        run.wait_for(
            "a checkpoint after there is space again",
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
        f"{len(alarms)} alarms; trained on meanwhile, {restarts} restarts, 0 manual steps, "
        "no row of the journal lost; bit-equal",
    )  # fmt: skip


def _steps_done(run: TinyRun) -> int:
    return max(oracles.weights_by_rank(run.records), default=0)


def disk_read_only(place: Place, options: Options) -> Outcome:
    """B3: a disk that reports an error and turns read-only, as ext4 does; then it is mended."""
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
            say("b3: read-only")
            code = run.wait(300)
            took_s = time.time() - broken_s
            said = run.tail(3000)
        disk.mend()
        with TinyRun(
            place, "b3", storage=disk.folder, schedule__epochs=8, evaluate_every_epochs=8,
            checkpoint__every_steps=5, environment={"MLFLOW_TRACKING_URI": uri},
        ) as run:  # fmt: skip
            run.start(resume=True)
            run.finish()
            same_as_undisturbed(place, run, 8)
    expect(code == 1, f"exit code {code}")
    expect("Read-only" in said or "read-only" in said, f"the cause is not told: {said[-500:]}")
    expect("--resume" in said, f"no hint how to go on: {said[-500:]}")
    return Outcome(
        round(took_s, 1), "s until it stopped", True,
        "told the cause and how to go on; resumed after mending, bit-equal",
    )  # fmt: skip


def damaged_newest(place: Place, options: Options) -> Outcome:
    """B4: each file of the newest checkpoint is cut short; the one before is used."""
    return _damage(place, options.times(20), _truncate, "b4", "fell back")


def bit_flipped(place: Place, options: Options) -> Outcome:
    """B5: one bit of the newest checkpoint, anywhere."""
    return _damage(place, options.times(200), _flip, "b5", "detected")


def files_missing(place: Place, options: Options) -> Outcome:
    """B6: a file, or all files, or the folder of the newest is not there."""
    return _damage(place, options.times(12), _remove, "b6", "fell back")


def _damage(
    place: Place, times: int, damage: Callable[[Path, random.Random], None], name: str, word: str
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
        told: list[str] = []
        began_s = time.monotonic()
        found = newest_checkpoint(folder, told.append)
        slowest_s = max(slowest_s, time.monotonic() - began_s)
        was_told = bool(told) or not (folder / steps[-1].name).exists()
        good += found is not None and found.path.name == steps[-2].name and was_told
    # And once for real: a run goes on from the one before, to the same end.
    run = Direct(place, f"{name}-run")
    shutil.copytree(clean.folder / "checkpoints", run.folder / "checkpoints")
    damage(run.folder / "checkpoints" / steps[-1].name, chance)
    run.finish(2)
    expect(run.weights() == clean.weights(), "went on, but to other weights")
    return Outcome(
        f"{good}/{times}", word, good == times,
        f"slowest look {slowest_s:.2f} s; the run goes on to bit-equal weights",
    )  # fmt: skip


def _truncate(checkpoint: Path, chance: random.Random) -> None:
    file = chance.choice(sorted(checkpoint.iterdir()))
    content = file.read_bytes()
    _replace(file, content[: chance.randrange(len(content))])


def _flip(checkpoint: Path, chance: random.Random) -> None:
    files = sorted(checkpoint.iterdir())
    # By size: most flips hit tensors, as they would on a disk; some the small files.
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
    """B7: what is not a checkpoint is empty or cut short, Ray's own record of the run included."""
    damages: list[tuple[str, Callable[[bytes], bytes]]] = [
        ("empty", lambda content: b""),
        ("cut short", lambda content: content[: len(content) // 2]),
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
        say(f"b7: {sorted(str(path.relative_to(run.folder)) for path in files)}")
        for number, (word, damage) in enumerate(damages):
            for path in files:
                if path.exists():
                    path.write_bytes(damage(path.read_bytes()))
            say(f"b7: all of them {word}")
            run.start(resume=True)
            if number < len(damages) - 1:
                run.wait_for_step(run.step() + 12)
                run.signal(signal.SIGTERM)
                expect(run.wait() == 143, f"{word}: {run.tail()}")
                run.family.wait_until_gone(30)
        run.finish()
        expect(
            oracles.weights_sha256(run.folder) == undisturbed(place).weights(),
            "went on, but to other weights",
        )
    count = len(files) * len(damages)
    return Outcome(
        f"{count}/{count}", "rebuilt", True, f"{len(files)} files, all empty, then all cut short"
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
        """The kernel meets an error on it, and from then on refuses to write."""
        source = _command("findmnt", "-no", "SOURCE", str(self.folder)).strip()
        Path(f"/sys/fs/ext4/{Path(source).name}/trigger_fs_error").write_text("1\n")

    def mend(self) -> None:
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
