"""Broken and hostile uploads: each is refused with a reason, and the service keeps working."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from deta.platform.data.image_decoding import ImageError, decode
from deta.platform.serving.config import ServingConfig
from deta.platform.serving.model_source import ModelSource
from deta.platform.serving.upload import decode_image
from deta.platform.system.origin_guard import Refusal
from tests.platform.serving.hostile_uploads import forget_peak, peak_mib, send, uploads
from tests.platform.serving.serving_case import encoded, random_image, running, tiny_checkpoint

SHARED = Path(os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[3] / "../shared"))
NUMBER = int(os.environ.get("DETA_HOSTILE_UPLOADS", "110"))  # 110: five of each kind


def test_hostile_uploads_are_refused_with_a_reason_and_cost_little_memory(tmp_path: Path):
    checkpoint = tiny_checkpoint(tmp_path / "run")
    made = list(uploads(NUMBER, seed=1))
    config = ServingConfig(read_timeout_s=60, answer_timeout_s=300, max_requests=4)
    with running(ModelSource(str(checkpoint), None, "cpu"), config) as here:
        for upload in made[:22]:
            send(upload, "127.0.0.1", here.port)
        if os.access("/proc/self/clear_refs", os.W_OK):
            forget_peak(os.getpid())
            before_mib = peak_mib(os.getpid())
        for upload in made:
            status, body = send(upload, "127.0.0.1", here.port)
            if upload.is_good:
                assert status == 200, (upload.what, body)
                continue
            assert 400 <= status < 500, (upload.what, status, body)
            if body.startswith(b"{"):  # otherwise from the HTTP server, for invalid requests
                problem = json.loads(body)
                assert problem["error"]
                assert problem["detail"]
        if os.access("/proc/self/clear_refs", os.W_OK):
            assert peak_mib(os.getpid()) - before_mib < 100
        assert here.detect(encoded(random_image()))[0] == 200
        assert here.metric("deta_serving_in_flight") == 0
        assert here.metric("deta_serving_requests_total", outcome="internal") == 0


@pytest.mark.skipif(not (SHARED / "bad" / "images").is_dir(), reason="no shared cases")
def test_bad_images_are_accepted_or_refused_as_in_training():
    """Except for formats other than JPEG and PNG, and for the service's own pixel limit."""
    config = ServingConfig()
    for path in sorted((SHARED / "bad" / "images").rglob("*")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        try:
            expected = decode(path, config.max_pixels)
        except ImageError:
            expected = None
        found, kind = None, ""
        try:
            found = decode_image(content, config)
        except Refusal as refusal:
            kind = refusal.kind
        if kind == "format":
            continue
        assert (found is None) == (expected is None), path
        if found is not None and expected is not None:
            assert found.tobytes() == expected.tobytes()
