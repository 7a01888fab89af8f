"""The page of the service in a real browser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deta.platform.serving.config import ServingConfig, token_hash
from deta.platform.serving.model_source import ModelSource
from tests.platform.serving.serving_case import (
    Server,
    encoded,
    random_image,
    running,
    tiny_checkpoint,
)  # fmt: skip

SCREENSHOTS = os.environ.get("DETA_SCREENSHOTS", "")  # a folder for screenshots; empty: none
CONFIG = ServingConfig(
    hosts=("127.0.0.1", "localhost"), max_bytes=300_000, answer_timeout_s=120, read_timeout_s=60
)
IMAGE = encoded(random_image(5, 400, 300))
TOKEN = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("page") / "run")


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    with running(ModelSource(str(checkpoint), None, "cpu"), CONFIG) as here:
        yield here


def opened(browser: Any, server: Server, **options: Any) -> tuple[Any, list[str]]:
    """Open the page; return it and a list that collects errors, dialogs and foreign requests."""
    view = browser.new_page(**options)
    view.set_default_timeout(60_000)
    trouble: list[str] = []
    view.on("pageerror", lambda error: trouble.append(str(error)))
    view.on("dialog", lambda dialog: (trouble.append("dialog"), dialog.dismiss()))
    view.on(
        "request",
        lambda sent: (
            None if sent.url.startswith((server.address, "blob:")) else trouble.append(sent.url)
        ),
    )
    view.add_init_script(
        "window.broken = []; addEventListener('securitypolicyviolation',"
        " (event) => window.broken.push(event.violatedDirective));"
    )
    view.goto(server.address)
    return view, trouble


def until(view: Any, expression: str) -> None:
    """Wait for a condition. Playwright's own wait compiles code, which the policy forbids."""
    for _ in range(600):
        if view.evaluate(expression):
            return
        view.wait_for_timeout(100)
    raise AssertionError(f"never: {expression}; {view.inner_text('main')}")


def choose(view: Any, content: bytes, name: str = "an image.jpg") -> None:
    view.set_input_files("#file", {"name": name, "mimeType": "image/jpeg", "buffer": content})


def shot(view: Any, name: str) -> None:
    if SCREENSHOTS:
        view.screenshot(path=f"{SCREENSHOTS}/{name}.png", full_page=True)


def boxes(view: Any) -> list[list[float]]:
    """Return left, top, width and height of each box, as shares of the image."""
    return view.evaluate(
        "[...document.querySelectorAll('.box')].map((box) => {"
        " const image = document.querySelector('#shown img').getBoundingClientRect();"
        " const at = box.getBoundingClientRect();"
        " return [(at.left - image.left) / image.width, (at.top - image.top) / image.height,"
        "  at.width / image.width, at.height / image.height]; })"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_boxes_of_a_chosen_image_are_where_the_service_returns_them(
    browser: Any, server: Server, width: int, scheme: str
):
    view, trouble = opened(
        browser, server, viewport={"width": width, "height": 900}, color_scheme=scheme
    )
    until(view, "document.getElementById('model').textContent.includes('2 classes')")
    shot(view, f"empty-{width}-{scheme}")
    choose(view, IMAGE)
    until(view, "document.querySelectorAll('.box').length > 0")

    _, answer = server.detect(IMAGE, "?min_score=0.01&upright=true")
    kept = [found for found in answer["detections"] if found["score"] >= 0.4]
    drawn = boxes(view)
    assert len(drawn) == len(kept) > 0
    for found, (left, top, box_width, box_height) in zip(kept, drawn, strict=True):
        x0, x1 = (min(max(found["box"][i] / 400, 0), 1) for i in (0, 2))
        y0, y1 = (min(max(found["box"][i] / 300, 0), 1) for i in (1, 3))
        # Half a percent is a pixel or two on the screen.
        assert [left, top] == pytest.approx([x0, y0], abs=0.005)
        assert box_width == pytest.approx(x1 - x0, abs=0.015)
        assert box_height == pytest.approx(y1 - y0, abs=0.015)
    # Names of classes are text, also those that look like HTML.
    assert view.locator("#found b").count() == 0
    assert "<b>star</b>" in view.inner_text("#found") or "disc" in view.inner_text("#found")
    assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shot(view, f"boxes-{width}-{scheme}")
    assert view.evaluate("window.broken") == []
    assert trouble == []
    view.close()


def test_the_slider_sets_how_many_boxes_are_shown(browser: Any, server: Server):
    view, _ = opened(browser, server)
    choose(view, IMAGE)
    until(view, "document.querySelectorAll('.box').length > 0")
    view.focus("#score")
    view.keyboard.press("Home")
    everything = len(boxes(view))
    view.keyboard.press("End")
    assert boxes(view) == []
    assert "lower the score" in view.inner_text("#status")
    assert everything > 1
    view.close()


def test_the_page_works_by_keyboard(browser: Any, server: Server):
    view, _ = opened(browser, server)
    view.keyboard.press("Tab")
    assert view.evaluate("document.activeElement.id") == "file"
    content = {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": IMAGE}
    chosen: list[Any] = []
    view.on("filechooser", lambda chooser: chosen.append(chooser))
    for attempt in range(50):
        if attempt % 10 == 0:  # a busy browser may not have watched for the dialog yet
            view.keyboard.press("Space")
        view.wait_for_timeout(200)
        if chosen:
            break
    chosen[0].set_files(content)
    until(view, "document.querySelectorAll('.box').length > 0")
    view.keyboard.press("Tab")
    assert view.evaluate("document.activeElement.id") == "score"
    view.keyboard.press("Tab")
    view.keyboard.press("Space")
    assert view.locator("#found button[aria-pressed=true]").count() == 1
    assert view.locator(".box.strong").count() == 1
    view.close()


def test_a_broken_image_shows_the_reason_and_the_next_one_works(browser: Any, server: Server):
    view, trouble = opened(browser, server)
    choose(view, IMAGE[: len(IMAGE) // 2], "<i>cut</i>.jpg")
    until(view, "!document.getElementById('error').hidden")
    message = view.inner_text("#error")
    assert "<i>cut</i>.jpg" in message
    assert "does not decode" in message
    assert "422" in message
    shot(view, "error")
    choose(view, encoded(random_image(5), "GIF"))
    until(view, "document.getElementById('error').textContent.includes('not a JPEG or PNG')")
    choose(view, IMAGE + bytes(400_000))
    until(view, "document.getElementById('error').textContent.includes('at most')")
    choose(view, IMAGE)
    until(view, "document.querySelectorAll('.box').length > 0")
    assert view.evaluate("document.getElementById('error').hidden")
    assert trouble == []
    view.close()


def test_an_image_can_be_dropped_anywhere(browser: Any, server: Server):
    view, _ = opened(browser, server)
    view.evaluate(
        "(bytes) => { const data = new DataTransfer();"
        " data.items.add(new File([new Uint8Array(bytes)], 'dropped.jpg'));"
        " const fire = (name) => document.body.dispatchEvent("
        "  new DragEvent(name, { dataTransfer: data, bubbles: true, cancelable: true }));"
        " fire('dragover'); fire('drop'); }",
        list(IMAGE),
    )
    until(view, "document.querySelectorAll('.box').length > 0")
    assert view.get_attribute("#shown img", "alt") == "dropped.jpg"
    view.close()


def test_an_image_with_an_exif_orientation_is_shown_and_detected_upright(
    browser: Any, server: Server
):
    exif = Image.Exif()
    exif[0x0112] = 6
    view, _ = opened(browser, server)
    choose(view, encoded(random_image(5, 400, 300), exif=exif))
    until(view, "document.querySelectorAll('#shown img').length > 0")
    until(view, "document.getElementById('timing').textContent.includes('300 × 400')")
    assert view.evaluate("document.querySelector('#shown img').naturalWidth") == 300
    assert view.evaluate("document.getElementById('error').hidden")
    view.close()


def test_a_service_with_a_token_shows_the_field_for_it(browser: Any, checkpoint: Path):
    config = replace(CONFIG, token_sha256=token_hash(TOKEN))
    with running(ModelSource(str(checkpoint), None, "cpu"), config) as here:
        view, _ = opened(browser, here)
        until(view, "!document.getElementById('token-row').hidden")
        shot(view, "token")
        choose(view, IMAGE)
        until(view, "document.getElementById('error').textContent.includes('token')")
        view.fill("#token", TOKEN)
        view.press("#token", "Enter")
        until(view, "document.querySelectorAll('.box').length > 0")
        assert view.evaluate("document.getElementById('token-row').hidden")
        assert TOKEN not in view.evaluate("JSON.stringify([{...localStorage}, document.cookie])")
        view.close()
