"""A Ray cluster of several nodes, each in its own network namespace, joined by a bridge.

A test can cut a cable: it sets the link of one node down, and packets are lost silently, as
between machines. Needs root and `ip`.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.chaos.processes import MARK, Family
from tests.chaos.runs import ROOT, Place, ScenarioError, clean_environment, expect, log_progress

GCS_PORT = 6379
RAY = str(Path(sys.executable).parent / "ray")
# Ray declares a node dead after this long without an answer. Its defaults take more than 60 s.
HEALTH = {
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "5",
}


class NetnsCluster:
    """Nodes 0, 1, … with one CPU each. Node 0 is the head node, where runs start."""

    def __init__(self, place: Place, num_nodes: int = 2) -> None:
        self.id = secrets.token_hex(2)
        self.folder = place.folder / f"n{self.id}"
        self.folder.mkdir()
        self.num_nodes = num_nodes
        self.mark = f"cluster-{secrets.token_hex(6)}"
        self.family = Family(f"{MARK}={self.mark}")
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = HEALTH | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": str(self.folder),
            "GLOO_SOCKET_IFNAME": "eth0",
            "TP_SOCKET_IFNAME": "eth0",
            "RAY_ADDRESS": f"{self.ip(0)}:{GCS_PORT}",
        }
        self.nodes: list[subprocess.Popen[bytes]] = []

    def ip(self, node: int) -> str:
        return f"10.77.{int(self.id[:2], 16)}.{node + 1}"

    def namespace(self, node: int) -> str:
        return f"chaos-{self.id}-{node}"

    def within(self, node: int) -> list[str]:
        """Return the prefix that makes a command run on that node."""
        return ["ip", "netns", "exec", self.namespace(node)]

    def __enter__(self) -> NetnsCluster:
        try:
            self._lay_cables()
            for node in range(self.num_nodes):
                self._start_node(node)
            self._wait_for_nodes()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut(self, node: int) -> None:
        _ip("link", "set", self._cable(node), "down")

    def heal(self, node: int) -> None:
        _ip("link", "set", self._cable(node), "up")

    def drain(self, node: int, grace_s: int) -> None:
        """Announce the preemption of a node, as a spot machine gets it."""
        nodes = self._ask("import ray, json; ray.init(log_to_driver=False); "
                          "print('\\n' + json.dumps(ray.nodes(), default=str))")  # fmt: skip
        (node_id,) = [n["NodeID"] for n in nodes if n["NodeManagerAddress"] == self.ip(node)]
        done = subprocess.run(
            [*self.within(0), RAY, "drain-node", "--address", f"{self.ip(0)}:{GCS_PORT}",
             "--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
             "--reason-message", "spot", "--deadline-remaining-seconds", str(grace_s)],
            env=self._env(), capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        expect(done.returncode == 0, f"ray drain-node: {done.stderr[-500:]}")

    def kill_node(self, node: int) -> None:
        """Kill all processes in the node's namespace, as if the machine were gone."""
        listed = _ip("netns", "pids", self.namespace(node))
        for pid in listed.split():
            subprocess.run(["kill", "-KILL", pid], check=False, capture_output=True)

    def close(self) -> None:
        self.family.kill()
        for node in self.nodes:
            node.wait()
        for number in range(self.num_nodes):
            for pid in _ip("netns", "pids", self.namespace(number), check=False).split():
                subprocess.run(["kill", "-KILL", pid], check=False, capture_output=True)
            _ip("netns", "del", self.namespace(number), check=False)
        _ip("link", "del", f"cb{self.id}", check=False)

    def _cable(self, node: int) -> str:
        return f"cv{self.id}{node}"

    def _lay_cables(self) -> None:
        bridge = f"cb{self.id}"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        for node in range(self.num_nodes):
            name, cable = self.namespace(node), self._cable(node)
            _ip("netns", "add", name)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", cable, "master", bridge)
            _ip("link", "set", cable, "up")
            _ip("-n", name, "addr", "add", f"{self.ip(node)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def _env(self) -> dict[str, str]:
        return clean_environment() | self.environment | {MARK: self.mark}

    def _start_node(self, node: int) -> None:
        for tries_left in (2, 1, 0):  # Ray's limit is 30 s, which a busy machine can exceed
            if self._try_to_start(node, tries_left == 0):
                log_progress(f"node {node} is up")
                return

    def _try_to_start(self, node: int, must: bool) -> bool:
        command = [*self.within(node), RAY, "start", "--block", "--num-cpus=1"]
        command += [f"--node-ip-address={self.ip(node)}", "--object-store-memory=100000000"]
        command += ["--disable-usage-stats"]
        if node == 0:
            command += ["--head", f"--port={GCS_PORT}", "--include-dashboard=true"]
            command += [f"--temp-dir={self.folder}"]
        else:
            command += [f"--address={self.ip(0)}:{GCS_PORT}"]
        env = self._env()
        if node == 0:
            del env["RAY_ADDRESS"]
        log_path = self.folder / f"node-{node}.log"
        with log_path.open("wb") as log:
            self.nodes.append(
                subprocess.Popen(
                    command,
                    env=env,
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
        deadline_s = time.monotonic() + 120
        while b"Ray runtime started" not in log_path.read_bytes():
            if self.nodes[-1].poll() is not None or time.monotonic() > deadline_s:
                self.kill_node(node)
                expect(not must, f"node {node}: {log_path.read_text()[-800:]}")
                return False
            time.sleep(0.2)
        return True

    def _wait_for_nodes(self) -> None:
        for _ in range(20):
            nodes = self._ask("import ray, json; ray.init(log_to_driver=False); "
                              "print('\\n' + json.dumps(ray.nodes(), default=str))")  # fmt: skip
            if sum(bool(node["Alive"]) for node in nodes) == self.num_nodes:
                return
            time.sleep(1)
        raise ScenarioError(f"not all nodes came up: {nodes}")

    def _ask(self, program: str) -> list[dict[str, Any]]:
        done = subprocess.run(
            [*self.within(0), sys.executable, "-c", program], env=self._env(), cwd="/",
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        expect(done.returncode == 0, f"the cluster does not answer: {done.stderr[-800:]}")
        answer: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
        return answer


def is_possible() -> bool:
    """Return whether this process may create namespaces and mount file systems."""
    return os.geteuid() == 0 and Path("/usr/sbin/ip").exists()


def _ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    expect(done.returncode == 0 or not check, f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
