#!/usr/bin/env python
"""Serve a model over HTTP: send an image, get its detections as JSON.

  python jobs/serve.py models:/deta@champion
  curl --data-binary @street.jpg -H 'Content-Type: image/jpeg' http://127.0.0.1:8000/v1/detect

MODEL is models:/NAME@ALIAS or models:/NAME/NUMBER in MLflow's registry, a run's folder, or one
checkpoint. A service of an alias loads each new version within seconds of its promotion, and no
request is dropped. The page at / shows the boxes of an image that you drop on it; /openapi.json
describes the API; /health and /ready are for health checks, and /metrics for Prometheus (under Ray,
at the address that is printed).

The service runs on Ray Serve: on the cluster that RAY_ADDRESS names, or on one started here.
--without-ray runs a single process with the same API.

Only this machine can reach the service, unless you set --host; then each request needs
a token, which is read from --token-file or from the variable DETA_SERVE_TOKEN. There is no
TLS: between machines, use a proxy with TLS.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from tyro.conf import Positional, UseAppendAction

from deta.jobs.command_line import echo, read_options, run_tool
from deta.platform.run.run_paths import require_paths

# Before anything slow is imported: --help does not need it.
if TYPE_CHECKING:
    from deta.platform.serving.config import ServingConfig
    from deta.platform.serving.model_source import ModelSource


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    model: Positional[str]  # models:/deta@champion, run or checkpoint
    host: str = "127.0.0.1"  # address to listen on
    port: int = 8000  # with --without-ray also 0: any free port
    token_file: Path | None = None  # holds the token that requests need
    # Answer only requests with this Host; may be given more than once.
    allow_host: UseAppendAction[tuple[str, ...]] = ()
    tracking_uri: str | None = None  # address of MLflow; without it, MLFLOW_TRACKING_URI
    device: Literal["auto", "cpu", "cuda"] = "auto"
    without_ray: bool = False  # a single process, no cluster
    replicas: int = 1  # processes on the cluster
    cpus: float = 1.0  # CPUs of each replica
    # Limits, named as in platform/serving/config.py, whose values are the defaults.
    max_batch: int | None = None  # images per batch
    batch_wait: float | None = None  # seconds that the first image of a batch waits for others
    # Concurrent requests of a process; others get 503 and Retry-After.
    max_requests: int | None = None
    max_bytes: int | None = None  # of an image
    max_pixels: int | None = None  # of an image
    read_timeout: float | None = None  # seconds for an image to arrive
    answer_timeout: float | None = None  # seconds for an answer
    poll: float | None = None  # seconds between two checks of an alias


def main() -> NoReturn:
    options = read_options(ServeOptions, __doc__)
    run_tool(lambda: _prepare(options), lambda prepared: _serve(*prepared, options))


def _prepare(options: ServeOptions) -> tuple[ModelSource, ServingConfig]:
    require_paths({"": options.model.removesuffix("/best")})
    from deta.platform.serving.config import TOKEN_VARIABLE, ServingConfig, read_token, token_hash
    from deta.platform.serving.model_source import model_source
    from deta.platform.system.child_server import is_loopback

    if not 0 <= options.port <= 65535 or (options.port == 0 and not options.without_ray):
        raise ValueError(f"--port {options.port}: give one from 1 to 65535")
    if options.replicas < 1 or options.cpus <= 0:
        raise ValueError("--replicas must be at least 1, and --cpus above 0")
    token = read_token(options.token_file)
    if not token and not is_loopback(options.host):
        raise ValueError(
            f"--host {options.host}: other machines can reach the service, so it needs a token; "
            f"give --token-file, or set {TOKEN_VARIABLE} (openssl rand -hex 32)"
        )
    hosts = tuple(name.lower() for name in options.allow_host)
    if not hosts and is_loopback(options.host):
        hosts = ("127.0.0.1", "localhost", "[::1]")
    given: dict[str, Any] = {
        field.name: limit
        for field in fields(ServingConfig)
        if (limit := getattr(options, field.name.removesuffix("_s"), None)) is not None
    }
    config = ServingConfig(token_sha256=token_hash(token) if token else "", hosts=hosts, **given)
    os.environ.pop(TOKEN_VARIABLE, None)  # child processes must not inherit it
    source = model_source(options.model, options.tracking_uri, options.device)
    return source, config


def _serve(source: ModelSource, config: ServingConfig, options: ServeOptions) -> int:
    if options.without_ray:
        from deta.platform.serving.uvicorn_server import serve_alone

        serve_alone(source, config, options.host, options.port, _print_addresses)
        return 0
    try:
        from deta.platform.serving.ray_serve import (
            Placement,
            metrics_addresses,
            service_on_ray,
            wait_for_a_signal,
        )
    except ImportError as error:
        raise RuntimeError(
            f"{error}; pip install 'deta-platform[serve]', or add --without-ray"
        ) from error
    placement = Placement(
        host=options.host,
        port=options.port,
        replicas=options.replicas,
        cpus=options.cpus,
        device=options.device,
    )
    with service_on_ray(source, config, placement, echo) as address:
        _print_addresses(address)
        for metrics in metrics_addresses():
            echo(f"metrics: {metrics}")
        number = wait_for_a_signal()
        echo("stopping when the current requests are answered")
    return 0 if number == 2 else 128 + number


def _print_addresses(address: str) -> None:
    echo(f"page: {address}")
    echo(f"images: POST {address}v1/detect")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
