"""The detection service as an ASGI application: images in, detections as JSON out.

    POST /v1/detect     a JPEG or PNG as the body, or in the field `image` of a form
    GET  /v1/model      the current model, its classes, and the limits of an upload
    GET  /health        liveness: this process works
    GET  /ready         readiness: a model is loaded
    GET  /metrics       for Prometheus
    GET  /openapi.json  the description of this API
    GET  /              a page to drop an image on

It does not depend on Ray: any ASGI server runs it. `ray_serve.py` runs it on a cluster.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deta.platform.inference.predictor import Predictor, PreparedImage
from deta.platform.pages.render import content_policy, render_page
from deta.platform.serving.batcher import Batcher
from deta.platform.serving.config import ServingConfig
from deta.platform.serving.metrics import Measurements
from deta.platform.serving.model_source import ModelSlot, ModelSource
from deta.platform.serving.schema import DETECT_BODY, Detected, DetectParameters, Problem, Served
from deta.platform.serving.upload import decode_image, read_image
from deta.platform.system.origin_guard import OriginGuard, Refusal

log = logging.getLogger(__name__)

PAGE_STYLES, PAGE_SCRIPTS = ["serving/page.css"], ["serving/page.js"]
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": description}
    for status, description in (
        (400, "The body is empty, or a form that cannot be read"),
        (401, "The token is missing or wrong"),
        (408, "The body did not arrive in time"),
        (413, "Too many bytes or pixels"),
        (415, "Neither JPEG nor PNG"),
        (422, "The image or a parameter is broken"),
        (503, "Too many requests, or no model yet; see Retry-After"),
        (504, "The model did not answer in time"),
    )
}


class DetectionService:
    """The state of the application: model, queue, threads and the count of requests."""

    def __init__(
        self,
        source: ModelSource,
        config: ServingConfig,
        measurements: Measurements,
        load_first: bool,
    ) -> None:
        self.config, self.measurements, self.load_first = config, measurements, load_first
        self.slot = ModelSlot(source, config, measurements)
        self.batcher = Batcher(config.max_batch, config.batch_wait_s, measurements)
        self.decoders = ThreadPoolExecutor(config.decoders, thread_name_prefix="decoder")
        self.in_flight = 0

    @asynccontextmanager
    async def running(self, _app: FastAPI) -> AsyncIterator[None]:
        """Run the batcher and follow the model source until the end of the block."""
        if self.load_first:
            await self.slot.refresh()
        async with self.batcher:
            following = asyncio.create_task(self.slot.follow(), name="model")
            try:
                yield
            finally:
                following.cancel()
                self.decoders.shutdown(wait=False, cancel_futures=True)

    def health_problem(self) -> str:
        """Return why this process should be replaced; empty if it need not."""
        if not self.batcher.is_working:
            return "the batcher has stopped"
        if self.batcher.busy_s > self.config.stuck_s:
            return f"the model has worked on one batch for {self.batcher.busy_s:.0f} s"
        return ""

    def retry_after(self) -> dict[str, str]:
        """Return the header Retry-After for a client that is refused now."""
        batches = math.ceil((self.batcher.num_waiting + 1) / self.config.max_batch)
        return {"Retry-After": str(min(60, math.ceil(batches * self.batcher.mean_batch_s)))}

    async def detect(self, request: Request, upright: bool, **limits: Any) -> dict[str, Any]:
        """Return the response to one request, with its metrics recorded.

        Args:
            limits: of `ServedModel.as_json`.

        Raises:
            Refusal, ClientDisconnect: recorded as the request's outcome.
        """
        began_s = time.monotonic()
        outcome = "internal"
        self.in_flight += 1
        self.measurements.record("in_flight", self.in_flight)
        try:
            if self.in_flight > self.config.max_requests:
                detail = f"{self.config.max_requests} requests are in progress; try again later"
                raise Refusal(503, "busy", detail, self.retry_after())
            content = await read_image(request.headers, request.stream(), self.config)
            read_s = time.monotonic() - began_s
            self.measurements.record("phase_seconds", read_s, phase="read")
            try:
                async with asyncio.timeout(self.config.answer_timeout_s):
                    response = await self._run_model(content, upright, limits)
            except TimeoutError:
                detail = f"no answer within {self.config.answer_timeout_s:g} s; try again later"
                raise Refusal(504, "answer_timeout", detail, self.retry_after()) from None
            outcome = "ok"
            total_s = time.monotonic() - began_s
            response["seconds"] |= {"read": round(read_s, 6), "total": round(total_s, 6)}
            return response
        except Refusal as refusal:
            outcome = refusal.kind
            raise
        except (ClientDisconnect, asyncio.CancelledError):
            outcome = "disconnected"
            raise
        finally:
            self.in_flight -= 1
            self.measurements.record("in_flight", self.in_flight)
            self.measurements.request(outcome, time.monotonic() - began_s)

    async def _run_model(
        self, content: bytes, upright: bool, limits: Mapping[str, Any]
    ) -> dict[str, Any]:
        model = self.slot.loaded()
        began_s = time.monotonic()
        with self.batcher.coming():
            prepared = await asyncio.get_running_loop().run_in_executor(
                self.decoders, _decode_and_prepare, model.predictor, content, self.config, upright
            )
        decode_s = time.monotonic() - began_s
        result = await self.batcher.detect(model.predictor, prepared)
        detections = model.as_json(result.detections, **limits)
        seconds = {"decode": decode_s, "wait": result.wait_s, "model": result.model_s}
        for name, value in seconds.items():
            self.measurements.record("phase_seconds", value, phase=name)
        self.measurements.record("detections", len(detections))
        height, width = prepared.size_px
        return {
            "model": model.name.as_json(),
            "image": {"width": width, "height": height},
            "detections": detections,
            "batch_size": result.batch_size,
            "seconds": {name: round(value, 6) for name, value in seconds.items()},
        }


def create_app(
    source: ModelSource,
    config: ServingConfig,
    measurements: Measurements,
    *,
    load_first: bool = False,
) -> FastAPI:
    """Return the application.

    Args:
        load_first: load a model before the first request is accepted, for load balancers that do
            not check /ready.
    """
    service = DetectionService(source, config, measurements, load_first)
    # FastAPI's own pages of documentation load scripts from other servers.
    app = FastAPI(
        title="DETA detections",
        description="Objects in an image: category, score and box.",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=service.running,
        responses={403: {"model": Problem, "description": "A foreign Host or Origin"}},
    )
    app.state.service = service
    app.add_middleware(OriginGuard, hosts=config.hosts, accepts_token=config.accepts_token)
    app.add_exception_handler(RequestValidationError, _parameter_problem)
    app.add_exception_handler(HTTPException, _http_problem)
    # No client reads it.
    app.add_exception_handler(ClientDisconnect, lambda *_: Response(status_code=499))

    @app.post("/v1/detect", responses=PROBLEMS, response_model=Detected, openapi_extra=DETECT_BODY)
    async def detect(
        request: Request,
        parameters: Annotated[DetectParameters, Query()],
    ) -> Response:
        """Return the detections in an image, best first."""
        return JSONResponse(await service.detect(request, **parameters.model_dump()))

    @app.get("/v1/model", response_model=Served, responses={503: PROBLEMS[503]})
    async def model() -> dict[str, Any]:
        """Return the current model, its classes, and the limits of an upload."""
        served = service.slot.loaded()
        return {
            "model": served.name.as_json(),
            "categories": [asdict(category) for category in served.predictor.categories],
            "max_bytes": config.max_bytes,
            "max_pixels": config.max_pixels,
            "problem": service.slot.problem or None,
        }

    @app.get("/health", responses={503: PROBLEMS[503]})
    async def health() -> dict[str, str]:
        """Return 200 if this process works."""
        if problem := service.health_problem():
            raise Refusal(503, "unhealthy", problem)
        return {"status": "ok"}

    @app.get("/ready", responses={503: PROBLEMS[503]})
    async def ready() -> dict[str, str]:
        """Return 200 if a model is loaded."""
        if service.slot.model is None:  # without the reason: no token is needed here
            raise Refusal(503, "no_model", "no model is loaded yet", {"Retry-After": "5"})
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return the metrics in Prometheus's text format."""
        text = measurements.text()
        if text is None:
            raise Refusal(404, "metrics", "Ray exports this service's metrics on its own port")
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    # The page is the same for everybody. Its policy lets the browser run this script, call this
    # service and do nothing else.
    policy = content_policy(PAGE_SCRIPTS, styles=PAGE_STYLES, is_served=True)
    front_page = HTMLResponse(
        render_page(
            "serving/page.html.j2",
            title="Objects in an image",
            styles=PAGE_STYLES,
            scripts=PAGE_SCRIPTS,
        ),
        headers={"Content-Security-Policy": policy},
    )

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        return front_page

    return app


def _decode_and_prepare(
    predictor: Predictor, content: bytes, config: ServingConfig, upright: bool
) -> PreparedImage:
    try:
        return predictor.prepare(
            decode_image(content, config, predictor.config.data.pixel_rules, upright=upright)
        )
    except MemoryError as error:
        detail = "too little memory for this image at the moment; try again later"
        raise Refusal(503, "memory", detail) from error


def _parameter_problem(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = "; ".join(
        f"{'.'.join(str(part) for part in fault['loc'][1:])}: {fault['msg']}"
        for fault in error.errors()[:4]
    )
    return Refusal(422, "parameter", faults).response()


def _http_problem(_request: Request, error: Exception) -> Response:
    """Return a refusal, or an error of the framework, such as 404 and 405, in the same form."""
    assert isinstance(error, HTTPException)
    if not isinstance(error, Refusal):
        kind = {404: "path", 405: "method"}.get(error.status_code, "request")
        error = Refusal(error.status_code, kind, error.detail, error.headers)
    return error.response()
