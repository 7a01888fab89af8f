"""Reads images ahead in threads, and groups images of one size into batches."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from deta.platform.data.image_decoding import AS_STORED, Header, ImageError, read_header
from deta.platform.data.image_sizes import PixelRules

NUM_READERS = 4  # threads that read and resize images while the model works
NUM_SHOWN = 10  # files named in one message
WINDOW_BATCHES = 32  # images of one size are looked for among those of this many batches
# Without a given size. A batch keeps a device busy from about this many pixels on, and needs more
# memory with each image.
BATCH_PIXELS = {"cpu": 400_000, "cuda": 4_000_000}
MAX_BATCH = 16

Item = TypeVar("Item")
Result = TypeVar("Result")


def batches_of_one_shape(
    shapes: Sequence[tuple[int, int]], batch_size: int | None, device: str = "cpu"
) -> list[list[int]]:
    """Group images of one shape into batches, in about their order.

    Args:
        batch_size: the most images in a batch; None: as many as keep the device busy.

    An image that is padded beside a larger one gets other features near its right and bottom
    border: the convolutions' biases fill the padding, which would be zeros without it, and
    GroupNorm includes the padding. Scores shift by hundredths. So nothing is padded here.

    Returns:
        Batches of indices, each index once. An image waits for others of its
        shape for at most `WINDOW_BATCHES` batches.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    plan = []
    window = (batch_size or MAX_BATCH) * WINDOW_BATCHES
    for start in range(0, len(shapes), window):
        by_shape = defaultdict(list)
        for index in range(start, min(start + window, len(shapes))):
            by_shape[shapes[index]].append(index)
        batches = [
            indices[first : first + most]
            for (height, width), indices in by_shape.items()
            for most in [batch_size or _busy_batch(height * width, device)]
            for first in range(0, len(indices), most)
        ]
        plan += sorted(batches)  # by their first images, so that results wait little
    return plan


def _busy_batch(pixels: int, device: str) -> int:
    """Return how many images of this many pixels keep a device busy."""
    most = BATCH_PIXELS.get(device, BATCH_PIXELS["cuda"]) // max(pixels, 1)
    return min(max(most, 1), MAX_BATCH)


def read_headers(
    paths: Sequence[Path], max_pixels: int, rules: PixelRules = AS_STORED
) -> list[Header | ImageError]:
    """Read the header of every image file, or find why it is missing, no image, or too large."""
    headers: list[Header | ImageError] = []
    for _, future in read_ahead(lambda path: read_header(path, max_pixels, rules), paths):
        try:
            headers.append(future.result())
        except ImageError as error:
            headers.append(error)
    return headers


def check_headers(
    paths: Sequence[Path], max_pixels: int, rules: PixelRules = AS_STORED
) -> list[Header]:
    """Read the header of every image file.

    Raises:
        ImageError: names each file that is missing, not an image, or too large.
    """
    found = read_headers(paths, max_pixels, rules)
    headers = [one for one in found if not isinstance(one, ImageError)]
    faults = [str(one) for one in found if isinstance(one, ImageError)]
    if faults:
        more = [f"... and {len(faults) - NUM_SHOWN} more"] if len(faults) > NUM_SHOWN else []
        raise ImageError(
            f"{len(faults)} of {len(paths)} images cannot be used, so none was predicted:\n  "
            + "\n  ".join(faults[:NUM_SHOWN] + more)
        )
    return headers


def read_ahead(
    work: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[tuple[Item, Future[Result]]]:
    """Yield each item with its result, in order. Threads work on the next few items meanwhile."""
    # No `with`: a generator must not join a thread pool in its cleanup. If the caller stops early,
    # the garbage collector runs the cleanup at any point, even while a thread is being started, and
    # joining threads there deadlocks. The threads of a collected pool end by themselves.
    pool = ThreadPoolExecutor(NUM_READERS)
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) > 2 * NUM_READERS:
            yield waiting.popleft()
    yield from waiting
