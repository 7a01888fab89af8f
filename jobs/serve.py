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

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from deta.jobs.command_line import described_parser, echo, run_tool

# Before anything slow is imported: --help does not need it.
if TYPE_CHECKING:
    from deta.platform.serving.config import ServingConfig
    from deta.platform.serving.model_source import ModelSource


@dataclass(frozen=True)
class _ServeInputs:
    source: ModelSource
    config: ServingConfig


def main() -> NoReturn:
    parser = described_parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="models:/deta@champion, run or checkpoint")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on, %(default)s")
    parser.add_argument(
        "--port",
        type=int,
        default=8000,
        help="%(default)s; with --without-ray also 0: any free port",
    )
    parser.add_argument(
        "--token-file", metavar="FILE", type=Path, help="holds the token that requests need"
    )
    parser.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="answer only requests with this Host; may be given more than once",
    )
    parser.add_argument("--tracking-uri", help="address of MLflow; default MLFLOW_TRACKING_URI")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--without-ray", action="store_true", help="a single process, no cluster")
    parser.add_argument("--replicas", type=int, default=1, help="processes on the cluster, 1")
    parser.add_argument("--cpus", type=float, default=1.0, help="CPUs of each replica, 1")
    limits = parser.add_argument_group("limits")
    for option, kind, text in (
        ("max-batch", int, "images per batch"),
        ("batch-wait", float, "seconds that the first image of a batch waits for others"),
        ("max-requests", int, "concurrent requests of a process; others get 503 and Retry-After"),
        ("max-bytes", int, "of an image"),
        ("max-pixels", int, "of an image"),
        ("read-timeout", float, "seconds for an image to arrive"),
        ("answer-timeout", float, "seconds for an answer"),
        ("poll", float, "seconds between two checks of an alias"),
    ):
        limits.add_argument(f"--{option}", type=kind, metavar="N", help=text)
    arguments = parser.parse_args()
    run_tool(lambda: _prepare(arguments), lambda inputs: _serve(inputs, arguments))


def _prepare(arguments: argparse.Namespace) -> _ServeInputs:
    from deta.platform.serving.config import (
        TOKEN_VARIABLE,
        ServingConfig,
        read_token,
        token_hash,
    )
    from deta.platform.serving.model_source import model_source
    from deta.platform.system.child_server import is_loopback

    if not 0 <= arguments.port <= 65535 or (arguments.port == 0 and not arguments.without_ray):
        raise ValueError(f"--port {arguments.port}: give one from 1 to 65535")
    if arguments.replicas < 1 or arguments.cpus <= 0:
        raise ValueError("--replicas must be at least 1, and --cpus above 0")
    token = read_token(arguments.token_file)
    if not token and not is_loopback(arguments.host):
        raise ValueError(
            f"--host {arguments.host}: other machines can reach the service, so it needs a token; "
            f"give --token-file, or set {TOKEN_VARIABLE} (openssl rand -hex 32)"
        )
    hosts = tuple(name.lower() for name in arguments.allow_host)
    if not hosts and is_loopback(arguments.host):
        hosts = ("127.0.0.1", "localhost", "[::1]")
    named = {
        "max_batch": arguments.max_batch,
        "batch_wait_s": arguments.batch_wait,
        "max_requests": arguments.max_requests,
        "max_bytes": arguments.max_bytes,
        "max_pixels": arguments.max_pixels,
        "read_timeout_s": arguments.read_timeout,
        "answer_timeout_s": arguments.answer_timeout,
        "poll_s": arguments.poll,
    }
    given = {key: value for key, value in named.items() if value is not None}
    config = ServingConfig(token_sha256=token_hash(token) if token else "", hosts=hosts, **given)
    os.environ.pop(TOKEN_VARIABLE, None)  # child processes must not inherit it
    source = model_source(arguments.model, arguments.tracking_uri, arguments.device)
    return _ServeInputs(source, config)


def _serve(inputs: _ServeInputs, arguments: argparse.Namespace) -> int:
    if arguments.without_ray:
        from deta.platform.serving.uvicorn_server import serve_alone

        serve_alone(inputs.source, inputs.config, arguments.host, arguments.port, _print_addresses)
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
        host=arguments.host,
        port=arguments.port,
        replicas=arguments.replicas,
        cpus=arguments.cpus,
        device=arguments.device,
    )
    with service_on_ray(inputs.source, inputs.config, placement, echo) as address:
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
