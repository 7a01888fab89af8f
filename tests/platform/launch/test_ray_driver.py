"""A driver that was started early ends with its parent, and is told what to do when it is known."""

from __future__ import annotations

import subprocess
import sys
import time

from deta.platform.launch.ray_driver import RayDriver
from deta.platform.run.config import ClusterConfig
from deta.platform.system.process_tree import RUN_MARK, marked_processes, new_mark

PARENT = """
import sys
from deta.platform.launch.ray_driver import RayDriver
from deta.platform.run.config import ClusterConfig
driver = RayDriver(sys.argv[1])
driver.plan(ClusterConfig(num_workers=1, gpu=False))
print(driver.process.pid, flush=True)
if sys.argv[2] == "refuse":
    sys.exit("bad data")
sys.stdin.read()
"""


def gone_within(mark: str, seconds: float) -> bool:
    deadline_s = time.monotonic() + seconds
    while marked_processes(RUN_MARK, mark):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.1)
    return True


def test_it_ends_when_the_command_refuses_its_input_or_is_killed():
    for how in ("refuse", "kill"):
        mark = new_mark()
        command = [sys.executable, "-c", PARENT, mark, how]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as parent:
            assert parent.stdout is not None
            assert int(parent.stdout.readline()) in marked_processes(RUN_MARK, mark)
            if how == "kill":
                parent.kill()
            parent.wait(30)
        assert gone_within(mark, 60), how


def test_a_driver_that_died_takes_orders_without_an_error(tmp_path):
    driver = RayDriver(new_mark())
    driver.process.kill()
    driver.process.wait()
    driver.plan(ClusterConfig(num_workers=1, gpu=False))
    driver.begin(tmp_path)
    driver.terminate()
    assert gone_within(driver.run_mark, 10)
