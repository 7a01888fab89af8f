"""The service as one process: it serves until a signal, and reports a taken port."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from deta.platform.serving.config import ServingConfig
from deta.platform.serving.model_source import ModelSource
from deta.platform.serving.uvicorn_server import serve_alone
from tests.platform.serving.serving_case import WITHIN_S, tiny_checkpoint, wait_until

ROOT = Path(__file__).resolve().parents[3]


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}ready", timeout=WITHIN_S) as response:
            return response.status == 200
    except urllib.error.HTTPError:  # no model yet
        return False


def test_a_process_serves_on_a_free_port_until_sigterm(tmp_path: Path):
    checkpoint = tiny_checkpoint(tmp_path / "run")
    command = [sys.executable, "jobs/serve.py", str(checkpoint), "--without-ray", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().removeprefix("page: ").strip()
            assert address.startswith("http://127.0.0.1:")
            wait_until(lambda: is_ready(address))
            process.send_signal(signal.SIGTERM)
            process.wait(WITHIN_S)
            with pytest.raises(urllib.error.URLError, match="refused"):
                urllib.request.urlopen(f"{address}ready", timeout=5)
        finally:
            process.kill()


def test_a_taken_port_is_named(tmp_path: Path):
    source = ModelSource(str(tmp_path), None, "cpu")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{port}: "):
            serve_alone(source, ServingConfig(), "127.0.0.1", port, lambda address: None)
