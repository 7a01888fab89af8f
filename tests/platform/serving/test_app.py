"""The API of the service, with a real server and real connections."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deta.platform.inference.predictor import Predictor
from deta.platform.serving.config import ServingConfig, token_hash
from deta.platform.serving.model_source import ModelSource
from deta.platform.serving.schema import Detected, Problem, Served
from tests.platform.serving.serving_case import (
    CATEGORIES,
    AliasSource,
    Server,
    encoded,
    form,
    random_image,
    running,
    tiny_checkpoint,
    wait_until,
)

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ServingConfig(
    max_bytes=200_000,
    max_pixels=1_000_000,
    read_timeout_s=300,  # long, for a busy machine
    answer_timeout_s=300,
    poll_s=0.05,
    hosts=("127.0.0.1", "localhost"),
    max_requests=64,
)
JPEG = {"Content-Type": "image/jpeg"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("serving")
    return {str(i): tiny_checkpoint(root / f"run-{i}", seed=i) for i in (1, 2)}


@pytest.fixture(scope="module")
def server(folders: dict[str, Path]) -> Iterator[Server]:
    with running(ModelSource(str(folders["1"]), None, "cpu"), CONFIG) as here:
        yield here


@pytest.fixture(scope="module")
def predictor(folders: dict[str, Path]) -> Predictor:
    return Predictor.from_checkpoint(folders["1"])


def test_prediction_and_service_load_no_training_tracking_or_ray():
    """A replica or a script that predicts does not pay for what it does not use."""
    code = """
import sys
def rooms():
    names = [name.split(".") for name in sys.modules]
    return {name[2] for name in names if name[:2] == ["deta", "platform"] and name[2:]}
import deta.platform.inference.predictor
assert rooms() <= {"system", "data", "learning", "run", "checkpoint", "weights", "evaluation",
                   "inference"}, rooms()
assert not {"ray", "mlflow", "pyarrow", "hotcoco"} & set(sys.modules)
import deta.platform.serving.app, deta.platform.serving.uvicorn_server
assert not {"training", "launch", "tracking"} & rooms(), rooms()
assert "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_response_has_the_detections_of_the_predictor(server: Server, predictor: Predictor):
    image = random_image(5, 90, 70)
    [expected] = predictor.predict([image])

    status, answer = server.detect(encoded(image, "PNG"), "?min_score=0&max_detections=1000")

    assert status == 200
    Detected.model_validate(answer)
    assert answer["image"] == {"width": 90, "height": 70}
    assert answer["model"]["weights_sha256"] == predictor.weights_sha256
    scores = [found["score"] for found in answer["detections"]]
    assert scores == pytest.approx(expected.scores.tolist(), abs=1e-6)
    assert scores == sorted(scores, reverse=True)
    labels = expected.labels.tolist()
    assert [found["category_id"] for found in answer["detections"]] == [
        CATEGORIES[label].id for label in labels
    ]
    boxes = [edge for found in answer["detections"] for edge in found["box"]]
    assert boxes == pytest.approx(expected.boxes_px.flatten().tolist(), abs=0.01)


def test_parameters_limit_the_detections(server: Server):
    content = encoded(random_image(5))
    _, everything = server.detect(content, "?min_score=0&max_detections=1000")
    scores = [found["score"] for found in everything["detections"]]
    middle = scores[len(scores) // 2]
    _, few = server.detect(content, f"?min_score={middle}&max_detections=3")
    assert few["detections"] == everything["detections"][:3]
    assert len(scores) > 3


def test_a_form_and_a_body_get_the_same_detections(server: Server):
    content = encoded(random_image(6))
    body, content_type = form(content)
    _, by_form = server.detect(body, headers={"Content-Type": content_type})
    assert by_form["detections"] == server.detect(content)[1]["detections"] != []


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("?min_score=2", "min_score"),
        ("?min_score=nan", "min_score"),
        ("?max_detections=0", "max_detections"),
        ("?upright=perhaps", "upright"),
        ("?min_scor=0.9", "min_scor"),
    ],
)
def test_a_bad_parameter_is_named(server: Server, query: str, words: str):
    status, answer = server.detect(encoded(random_image()), query)
    assert (status, answer["error"]) == (422, "parameter")
    assert words in answer["detail"]


def test_refusals_have_one_form_and_are_counted_by_kind(server: Server):
    before = server.metric("deta_serving_requests_total", outcome="format")
    status, answer = server.detect(b"GIF89a" + b"\0" * 100)
    assert status == 415
    Problem.model_validate(answer)
    assert server.metric("deta_serving_requests_total", outcome="format") == before + 1
    for method, path, expected in (
        ("GET", "/nothing", 404),
        ("GET", "/v1/detect", 405),
        ("POST", "/ready", 405),
    ):
        status, _, content = server.request(method, path)
        assert status == expected
        Problem.model_validate_json(content)


def test_a_body_beyond_the_limit_is_refused_whether_declared_or_not(server: Server):
    status, answer = server.detect(b"\xff\xd8\xff" + b"\0" * 300_000)
    assert (status, answer["error"]) == (413, "too_large")

    answers: list[bytes] = []
    for _ in range(20):
        # The service answers and closes before all of it is sent, which may reset the connection
        # before the answer is read.
        with (
            suppress(BrokenPipeError, ConnectionResetError),
            posted(
                server, "Transfer-Encoding: chunked", *[b"2710\r\n" + b"x" * 10_000 + b"\r\n"] * 30
            ) as connection,
        ):
            answers.append(connection.recv(200))
            break
    assert answers, "the service closed 20 connections without an answer"
    assert answers[0].startswith(b"HTTP/1.1 413")


@contextmanager
def posted(server: Server, header: str, *parts: bytes) -> Iterator[socket.socket]:
    """Send the head and a part of the body of a request."""
    with socket.create_connection(("127.0.0.1", server.port), 300) as connection:
        head = f"POST /v1/detect HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n"
        for part in (head.encode(), *parts):
            connection.sendall(part)
        yield connection


def test_a_body_that_never_ends_is_408(folders: dict[str, Path]):
    config = replace(CONFIG, read_timeout_s=0.5)
    with (
        running(ModelSource(str(folders["1"]), None, "cpu"), config) as here,
        posted(here, "Content-Length: 1000", b"half") as connection,
    ):
        assert connection.recv(200).startswith(b"HTTP/1.1 408")


def test_a_disconnect_is_counted_and_affects_no_other_request(server: Server):
    with posted(server, "Content-Length: 1000", b"half"):
        pass
    wait_until(lambda: server.metric("deta_serving_requests_total", outcome="disconnected") == 1)
    assert server.detect(encoded(random_image()))[0] == 200
    assert server.metric("deta_serving_in_flight") == 0


def test_the_openapi_description_has_bodies_responses_and_parameters(server: Server):
    description = json.loads(server.request("GET", "/openapi.json")[2])
    detect = description["paths"]["/v1/detect"]["post"]
    assert {"image/jpeg", "image/png", "multipart/form-data"} <= set(
        detect["requestBody"]["content"]
    )
    assert {"200", "400", "401", "413", "415", "422", "503", "504"} <= set(detect["responses"])
    assert "Detected" in json.dumps(detect["responses"]["200"])
    assert {found["name"] for found in detect["parameters"]} == {
        "min_score", "max_detections", "upright",
    }  # fmt: skip


def test_the_model_endpoint_has_name_classes_and_limits(server: Server, predictor: Predictor):
    status, _, content = server.request("GET", "/v1/model")
    assert status == 200
    found = Served.model_validate_json(content)
    assert [(c.id, c.name) for c in found.categories] == [(c.id, c.name) for c in CATEGORIES]
    assert found.max_bytes == CONFIG.max_bytes
    assert found.model.weights_sha256 == predictor.weights_sha256


def test_prometheus_can_read_the_metrics(server: Server):
    server.detect(encoded(random_image()))
    status, headers, content = server.request("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(content.decode())}
    for name in ("requests", "request_seconds", "phase_seconds", "batch_size", "detections",
                 "in_flight", "model_info"):  # fmt: skip
        assert f"deta_serving_{name}" in families, name
    phases = {sample.labels["phase"] for sample in families["deta_serving_phase_seconds"].samples}
    assert phases == {"read", "decode", "wait", "model"}


def test_responses_have_security_headers_and_foreign_names_are_refused(server: Server):
    for method, path in (("GET", "/"), ("GET", "/health"), ("GET", "/nothing"), ("POST", "/")):
        _, headers, _ = server.request(method, path)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["content-security-policy"].startswith("default-src 'none'")
    assert server.request("GET", "/", headers={"Host": "evil.example"})[0] == 403
    assert server.request("GET", "/ready", headers={"Origin": "http://evil.example"})[0] == 403


def test_without_the_token_requests_are_refused(folders: dict[str, Path]):
    token = "0123456789abcdef0123"
    config = replace(CONFIG, token_sha256=token_hash(token))
    content = encoded(random_image())
    with running(ModelSource(str(folders["1"]), None, "cpu"), config) as here:
        status, headers, body = here.request("POST", "/v1/detect", content, JPEG)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert token not in body.decode()
        status, _ = here.detect(content, headers=JPEG | {"Authorization": f"Bearer {token}"})
        assert status == 200
        assert here.request("GET", "/metrics")[0] == 401
        assert here.request("GET", "/health")[0] == 200


def test_detections_under_load_are_those_of_each_image_alone(folders: dict[str, Path]):
    config = replace(CONFIG, max_batch=4, batch_wait_s=0.02)
    contents = [encoded(random_image(seed, 80, 60 if seed % 3 else 90)) for seed in range(12)]
    with running(ModelSource(str(folders["1"]), None, "cpu"), config) as here:
        alone = [here.detect(content)[1]["detections"] for content in contents]
        with ThreadPoolExecutor(12) as clients:
            together = list(clients.map(here.detect, contents * 3))
        sizes = {answer["batch_size"] for _, answer in together}
    assert max(sizes) > 1
    for (status, answer), expected in zip(together, alone * 3, strict=True):
        assert status == 200
        assert len(answer["detections"]) == len(expected)
        for found, best in zip(answer["detections"], expected, strict=True):
            # As in test_model.py: up to the order of sums.
            assert found["category_id"] == best["category_id"]
            assert found["score"] == pytest.approx(best["score"], abs=1e-4)
            assert found["box"] == pytest.approx(best["box"], abs=0.05)


def test_more_requests_than_allowed_get_503_and_retry_after(folders: dict[str, Path]):
    config = replace(CONFIG, max_requests=2)
    source = ModelSource(str(folders["1"]), None, "cpu")
    with running(source, config) as here, ExitStack() as stack:
        waiting = [stack.enter_context(posted(here, "Content-Length: 9")) for _ in range(2)]
        wait_until(lambda: here.metric("deta_serving_in_flight") == 2)
        status, headers, content = here.request("POST", "/v1/detect", b"x" * 50_000)
        assert status == 503
        assert json.loads(content)["error"] == "busy"
        assert 1 <= int(headers["retry-after"]) <= 60
        for connection in waiting:
            connection.sendall(b"no JPEG..")
            assert connection.recv(100).startswith(b"HTTP/1.1 415")
        assert here.detect(encoded(random_image()))[0] == 200


def test_a_response_that_takes_too_long_is_504_and_the_service_recovers(folders: dict[str, Path]):
    source = AliasSource(folders, "1")
    config = replace(CONFIG, answer_timeout_s=0.5, stuck_s=0.2)
    with running(source, config) as here:
        model = here.app.state.service.slot.model.predictor
        held, detect = threading.Event(), model.detect

        def hold(images):
            held.wait(60)
            return detect(images)

        model.detect = hold
        status, answer = here.detect(encoded(random_image()))
        assert (status, answer["error"]) == (504, "answer_timeout")
        assert here.request("GET", "/health")[0] == 503  # a supervisor may restart it
        held.set()
        model.detect = detect
        wait_until(lambda: here.request("GET", "/health")[0] == 200)
        here.app.state.service.config = CONFIG
        assert here.detect(encoded(random_image()))[0] == 200


def test_a_service_without_a_model_is_healthy_but_not_ready(folders: dict[str, Path]):
    source = AliasSource(folders, "1", broken={"1"})
    with running(source, CONFIG, ready=False) as here:
        assert here.request("GET", "/health")[0] == 200
        wait_until(lambda: "damaged" in here.app.state.service.slot.problem)
        status, _, content = here.request("GET", "/ready")
        assert status == 503
        assert b"damaged" not in content  # who has no token learns nothing
        status, answer = here.detect(encoded(random_image()))
        assert (status, answer["error"]) == (503, "no_model")
        assert "damaged" in answer["detail"]
        source.broken.clear()
        here.wait_until_ready()
        assert here.detect(encoded(random_image()))[0] == 200


def test_models_change_under_load_and_no_request_fails(folders: dict[str, Path]):
    source = AliasSource(folders, "1")
    content = encoded(random_image(8))
    answers: list[tuple[int, str | None, list[float]]] = []
    done = threading.Event()

    def send_requests(here: Server) -> None:
        while not done.is_set():
            status, answer = here.detect(content)
            scores = [found["score"] for found in answer.get("detections", [])]
            answers.append((status, answer.get("model", {}).get("version"), scores))

    with running(source, replace(CONFIG, poll_s=0.02)) as here, ThreadPoolExecutor(6) as clients:
        try:
            clients_done = [clients.submit(send_requests, here) for _ in range(6)]
            for change in range(6):
                place = len(answers)
                source.alias = "2" if change % 2 == 0 else "1"
                wait_until(lambda place=place: source.alias in {v for _, v, _ in answers[place:]})
        finally:
            done.set()
        for client in clients_done:
            client.result()
        changes = here.metric("deta_serving_model_changes_total", outcome="ok")
        sha256 = Predictor.from_checkpoint(folders["1"]).weights_sha256
        labels = {"name": "source", "version": "1", "sha256": sha256}
        assert here.metric("deta_serving_model_info", **labels) == 1
    assert changes == 6
    assert {status for status, _, _ in answers} == {200}
    # Each response comes from one model only.
    by_version = {v: [s for _, w, s in answers if w == v] for v in ("1", "2")}
    for scores in by_version.values():
        for found in scores:
            assert found == pytest.approx(scores[0], abs=1e-4)
    assert by_version["1"][0] != pytest.approx(by_version["2"][0], abs=1e-3)


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_in_use_and_is_retried_with_backoff(
    folders: dict[str, Path],
):
    def problem() -> str:
        return json.loads(here.request("GET", "/v1/model")[2])["problem"] or ""

    source = AliasSource(folders, "1", broken={"2"})
    with running(source, CONFIG) as here:
        source.alias = "2"
        wait_until(lambda: here.metric("deta_serving_model_changes_total", outcome="failed") >= 1)
        assert here.detect(encoded(random_image()))[1]["model"]["version"] == "1"
        assert here.request("GET", "/ready")[0] == 200
        wait_until(lambda: "damaged" in problem())
        time.sleep(0.6)
        assert source.opened.count("2") <= 5  # after 0.1, 0.2, 0.4, 0.8 s
        source.alias = "1"
        wait_until(lambda: not problem())
        assert source.opened.count("1") == 1  # it was never unloaded
