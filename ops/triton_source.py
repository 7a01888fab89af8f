"""The Triton kernels of the operator, one launch per level; `triton_kernels.py` calls them.

They use plain pointers and are not tuned: they run on CUDA devices if no nvcc was there to compile
`csrc/ms_deform_attn_cuda.cu`. They have their own file, because its import requires Triton.
"""

# B images   Q queries   H heads   L levels   P points   S pixels of all levels   D channels
#   value B S H D     locations B Q H L P 2     weights B Q H L P     output B Q H D
# A program handles one image, one head and QUERIES queries, with CHANNELS >= D channels per row.

import triton
import triton.language as tl

# Not specialised for these values, so that a new image size does not compile the kernel again.
SIZES = ["pixels", "queries", "samples", "first_sample", "points"]
SIZES += ["height", "width", "first_pixel"]


@triton.jit
def _place(locations, sample, is_query, height, width, SUM: tl.constexpr):
    """Return the column and row above left of a sample, and its fractions to the next ones."""
    x = tl.load(locations + 2 * sample, mask=is_query, other=-1.0).to(SUM) * width - 0.5
    y = tl.load(locations + 2 * sample + 1, mask=is_query, other=-1.0).to(SUM) * height - 0.5
    # Also false if a coordinate is NaN.
    touches = is_query & (x > -1) & (y > -1) & (x < width) & (y < height)
    x, y = tl.where(touches, x, 0.0), tl.where(touches, y, 0.0)
    left, top = tl.floor(x), tl.floor(y)
    return touches, left.to(tl.int32), top.to(tl.int32), x - left, y - top


@triton.jit(do_not_specialize=SIZES)
def forward_level(
    value,
    locations,
    weights,
    output,
    pixels,
    queries,
    samples,
    first_sample,
    points,
    height,
    width,
    first_pixel,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    CHANNELS: tl.constexpr,
    SUM: tl.constexpr,
):
    """Add the samples of one level to the output, which is of type SUM and starts as zeros."""
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    channel = tl.arange(0, CHANNELS)
    is_query, is_channel = query < queries, channel < D
    row = (image * queries + query) * HEADS + head  # QUERIES, int64
    total = tl.zeros([QUERIES, CHANNELS], dtype=SUM)
    for point in range(points):
        sample = row * samples + first_sample + point
        touches, left, top, right, below = _place(locations, sample, is_query, height, width, SUM)
        weight = tl.load(weights + sample, mask=touches, other=0.0).to(SUM)
        for corner in tl.static_range(4):
            x, y = left + corner % 2, top + corner // 2
            is_pixel = touches & (x >= 0) & (x < width) & (y >= 0) & (y < height)
            across = right if corner % 2 else 1 - right
            down = below if corner // 2 else 1 - below
            place = ((image * pixels + first_pixel + y * width + x) * HEADS + head) * D
            numbers = tl.load(
                value + place[:, None] + channel[None, :],
                mask=is_pixel[:, None] & is_channel[None, :],
                other=0.0,
            ).to(SUM)
            total += (weight * across * down)[:, None] * numbers
    to = output + row[:, None] * D + channel[None, :]
    mask = is_query[:, None] & is_channel[None, :]
    tl.store(to, tl.load(to, mask=mask, other=0.0) + total, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def backward_level(
    grad_output,
    value,
    locations,
    weights,
    grad_value,
    grad_locations,
    grad_weights,
    unit,
    pixels,
    queries,
    samples,
    first_sample,
    points,
    height,
    width,
    first_pixel,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    FIXED_POINT: tl.constexpr,
    QUERIES: tl.constexpr,
    CHANNELS: tl.constexpr,
    SUM: tl.constexpr,
):
    """Add the gradients of one level. `grad_value` is SUM, or int64 in steps of 1/unit."""
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    channel = tl.arange(0, CHANNELS)
    is_query, is_channel = query < queries, channel < D
    row = (image * queries + query) * HEADS + head
    grad = tl.load(
        grad_output + row[:, None] * D + channel[None, :],
        mask=is_query[:, None] & is_channel[None, :],
        other=0.0,
    ).to(SUM)
    to_add = grad
    if FIXED_POINT:
        to_add = grad * tl.load(unit).to(SUM)
    for point in range(points):
        sample = row * samples + first_sample + point
        touches, left, top, right, below = _place(locations, sample, is_query, height, width, SUM)
        weight = tl.load(weights + sample, mask=touches, other=0.0).to(SUM)
        of_weight = tl.zeros([QUERIES], dtype=SUM)
        of_x = tl.zeros([QUERIES], dtype=SUM)
        of_y = tl.zeros([QUERIES], dtype=SUM)
        for corner in tl.static_range(4):
            x, y = left + corner % 2, top + corner // 2
            is_pixel = touches & (x >= 0) & (x < width) & (y >= 0) & (y < height)
            across = right if corner % 2 else 1 - right
            down = below if corner // 2 else 1 - below
            place = ((image * pixels + first_pixel + y * width + x) * HEADS + head) * D
            places = place[:, None] + channel[None, :]
            mask = is_pixel[:, None] & is_channel[None, :]
            numbers = tl.load(value + places, mask=mask, other=0.0).to(SUM)
            dot = tl.sum(numbers * grad, 1)
            of_weight += across * down * dot
            of_x += (down if corner % 2 else -down) * dot
            of_y += (across if corner // 2 else -across) * dot
            addend = (weight * across * down)[:, None] * to_add
            if FIXED_POINT:
                addend = tl.floor(addend + 0.5).to(tl.int64)
            tl.atomic_add(grad_value + places, addend, mask=mask, sem="relaxed")
        tl.store(grad_weights + sample, of_weight, mask=is_query)
        tl.store(grad_locations + 2 * sample, weight * of_x * width, mask=is_query)
        tl.store(grad_locations + 2 * sample + 1, weight * of_y * height, mask=is_query)
