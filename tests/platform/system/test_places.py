"""The root of the code, and child processes that import it from there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deta.platform.system import places
from deta.platform.system.places import PROJECT_ROOT, bypass_proxies, child_environment

ASK = """
import sys, urllib.request
import requests
for host in ("127.0.0.1", "localhost"):
    url = f"http://{host}:{sys.argv[1]}/"
    print(requests.get(url, timeout=20).text)
    print(urllib.request.urlopen(url, timeout=20).read().decode())
"""


class Answering(ThreadingHTTPServer):
    """A server that answers every request, also one for a proxy, with its name."""

    def __init__(self, name: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(name)))
                self.end_headers()
                self.wfile.write(name.encode())

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def servers() -> Iterator[tuple[Answering, Answering]]:
    with Answering("service") as service, Answering("proxy") as proxy:
        yield service, proxy
        service.shutdown()
        proxy.shutdown()


def test_the_root_holds_the_package():
    assert (PROJECT_ROOT / "deta" / "platform" / "system" / "places.py").is_file()
    assert (PROJECT_ROOT / "deta" / "dashboards").is_dir()


def test_a_child_in_another_folder_imports_the_same_code(tmp_path: Path):
    code = "from deta.platform.system import places; print(places.__file__)"
    found = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env=child_environment(base={}),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert os.path.samefile(found.stdout.strip(), places.__file__)


def test_changes_and_earlier_paths_are_in_the_environment():
    env = child_environment({"A": "new"}, base={"A": "old", "B": "1", "PYTHONPATH": "/x"})
    assert env == {"A": "new", "B": "1", "PYTHONPATH": f"{PROJECT_ROOT}{os.pathsep}/x"}


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_children_ask_this_machine_and_not_a_proxy(servers: tuple[Answering, Answering], name: str):
    service, proxy = servers
    base = {"PATH": "/usr/bin:/bin", name: f"http://127.0.0.1:{proxy.server_port}"}
    command = [sys.executable, "-c", ASK, str(service.server_port)]
    asked = {}
    for case, env in (("before", base), ("after", child_environment(base=base))):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        asked[case] = set(done.stdout.split())
    assert "proxy" in asked["before"], "else this test shows nothing"
    assert asked["after"] == {"service"}


def test_other_exceptions_are_kept_and_nothing_is_added_twice():
    env = {"https_proxy": "http://p:1", "no_proxy": "a.example, localhost", "NO_PROXY": "b.example"}
    bypass_proxies(env)
    assert env["no_proxy"] == "a.example,localhost,b.example,127.0.0.1,::1,127.0.0.0/8"
    assert env["NO_PROXY"] == env["no_proxy"]
    before = dict(env)
    bypass_proxies(env)
    assert env == before


def test_without_a_proxy_the_environment_stays_as_it_is():
    env = {"PATH": "/bin", "no_proxy": "a"}
    bypass_proxies(env)
    assert env == {"PATH": "/bin", "no_proxy": "a"}
