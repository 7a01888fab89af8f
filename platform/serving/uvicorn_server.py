"""A detection service as one process on this machine, without Ray."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from deta.platform.serving.app import create_app
from deta.platform.serving.config import ServingConfig
from deta.platform.serving.metrics import Measurements
from deta.platform.serving.model_source import ModelSource
from deta.platform.system.patient_http import KEEP_ALIVE_S, MAX_CONNECTIONS, patient_protocol


def serve_alone(
    source: ModelSource,
    config: ServingConfig,
    host: str,
    port: int,
    on_listening: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM; finish the current requests first.

    Args:
        port: 0 for any that is free.
        on_listening: called with the address, once connections are accepted. The model may not be
            loaded yet; check /ready.

    Raises:
        OSError: the port is taken, or this machine has no such address.
    """
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(source, config, Measurements()),
            log_level="error",  # lower levels log a line for each invalid request
            access_log=False,
            server_header=False,
            ws="none",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=int(KEEP_ALIVE_S),
            http=patient_protocol(),
            timeout_graceful_shutdown=int(config.answer_timeout_s) + 1,
        )
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server(
            (host, port), family=family, dualstack_ipv6=family == socket.AF_INET6
        )
    except OSError as error:
        raise OSError(error.errno, f"{host}:{port}: {error.strerror}") from error
    with listening:
        name = f"[{host}]" if ":" in host else host
        on_listening(f"http://{name}:{listening.getsockname()[1]}/")
        server.run(sockets=[listening])
