"""Test `sample_order.py`: the order depends on seed and position, not on the number of ranks."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deta.platform.data.sample_order import (
    Draws,
    SampleKey,
    TrainingOrder,
    epoch_order,
    evaluation_batches,
    even_parts,
    replacement_index,
    sample_seed,
    splitmix64,
    splitmix64_table,
)

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)


def global_batch(order: TrainingOrder, step: int) -> list[SampleKey]:
    begin = step * order.total_batch_size
    return [order.sample_at(begin + place) for place in range(order.total_batch_size)]


def micro_batches(order: TrainingOrder, step: int, *share: int) -> list[list[SampleKey]]:
    return [
        [order.sample_at(position) for position in part]
        for part in order.micro_batch_positions(step, *share)
    ]


def test_splitmix64_draws_the_published_numbers():
    # The first outputs for seed 1234567, as widely used to check implementations of
    # https://prng.di.unimi.it/splitmix64.c
    assert [splitmix64(1234567, position) for position in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@given(seed=st.integers(0, 2**64 - 1))
def test_the_table_holds_the_same_numbers_as_single_draws(seed):
    assert splitmix64_table(seed, 20).tolist() == [splitmix64(seed, i) for i in range(20)]


def test_the_order_of_a_run_never_changes():
    # Written down once: a change here changes what every resumed run sees.
    assert epoch_order(42, 0, 8).tolist() == [6, 1, 3, 2, 0, 7, 4, 5]
    assert sample_seed(42, 3, 17) == 7812640314579384719


@given(seed=seeds, epoch=st.integers(0, 1000), num_images=sizes)
def test_every_epoch_holds_every_image_once(seed, epoch, num_images):
    order = TrainingOrder(seed, num_images, total_batch_size=1)

    keys = [order.sample_at(epoch * num_images + place) for place in range(num_images)]

    assert sorted(keys) == [SampleKey(epoch, index) for index in range(num_images)]


def test_epochs_and_seeds_have_different_orders():
    orders = {
        tuple(epoch_order(seed, epoch, 50).tolist()) for seed in range(20) for epoch in range(20)
    }
    assert len(orders) == 400


def test_each_image_is_as_likely_in_each_place():
    counts = np.zeros((10, 10))  # image, place
    for epoch in range(5000):
        counts[epoch_order(7, epoch, 10), np.arange(10)] += 1
    # Chi squared with 81 degrees of freedom exceeds 130 with a chance of 4e-4; the seed is fixed.
    assert ((counts - 500) ** 2 / 500).sum() < 130


@given(
    seed=seeds,
    num_images=sizes,
    total_batch_size=sizes,
    micro_batch_size=sizes,
    step=st.integers(0, 200),
    data=st.data(),
)
def test_the_ranks_together_compute_the_global_batch_in_order(
    seed, num_images, total_batch_size, micro_batch_size, step, data
):
    world_size = data.draw(st.integers(1, total_batch_size))
    order = TrainingOrder(seed, num_images, total_batch_size)

    ranks = [
        micro_batches(order, step, rank, world_size, micro_batch_size) for rank in range(world_size)
    ]

    assert list(chain(*chain(*ranks))) == global_batch(order, step)
    assert all(0 < len(part) <= micro_batch_size for rank in ranks for part in rank)
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
    # No rank computes more micro-batches than when the samples themselves were dealt out.
    largest_share = -(-total_batch_size // world_size)
    assert max(map(len, ranks)) == -(-largest_share // micro_batch_size)


@given(total_batch_size=sizes, micro_batch_size=sizes, step=st.integers(0, 50))
def test_micro_batches_do_not_depend_on_the_number_of_ranks(
    total_batch_size, micro_batch_size, step
):
    order = TrainingOrder(3, 23, total_batch_size)
    num_micro_batches = -(-total_batch_size // micro_batch_size)
    alone = micro_batches(order, step, 0, 1, micro_batch_size)

    for world_size in range(1, min(num_micro_batches, 5) + 1):
        together = chain(
            *(
                micro_batches(order, step, rank, world_size, micro_batch_size)
                for rank in range(world_size)
            )
        )
        assert list(together) == alone


@given(seed=seeds, num_images=sizes, total_batch_size=sizes, num_steps=st.integers(1, 20))
def test_steps_follow_each_other_without_a_gap(seed, num_images, total_batch_size, num_steps):
    order = TrainingOrder(seed, num_images, total_batch_size)

    seen = list(chain(*(global_batch(order, step) for step in range(num_steps))))

    assert seen == [order.sample_at(position) for position in range(num_steps * total_batch_size)]


@given(num_images=sizes, total_batch_size=sizes, epoch=st.integers(0, 30))
def test_an_epoch_begins_with_the_first_step_that_holds_nothing_older(
    num_images, total_batch_size, epoch
):
    order = TrainingOrder(0, num_images, total_batch_size)

    step = order.first_step_of_epoch(epoch)

    assert min(global_batch(order, step)).epoch >= epoch
    assert step == 0 or min(global_batch(order, step - 1)).epoch < epoch


def test_coco_takes_as_many_steps_as_the_released_code():
    order = TrainingOrder(42, num_images=118_287, total_batch_size=16)
    # 8 GPUs with 14,786 images each, 2 at a time: 7,393 steps an epoch; lr drop after epoch 10.
    assert order.first_step_of_epoch(1) == 7_393
    assert order.first_step_of_epoch(10) == 73_930
    assert order.first_step_of_epoch(12) == 88_716


def test_a_data_set_smaller_than_the_batch_goes_round():
    keys = global_batch(TrainingOrder(0, num_images=3, total_batch_size=8), 0)
    assert [key.epoch for key in keys] == [0, 0, 0, 1, 1, 1, 2, 2]


@given(length=st.integers(0, 100), num_parts=st.integers(1, 20))
def test_even_parts_cover_everything_and_differ_by_at_most_one(length, num_parts):
    parts = even_parts(length, num_parts)
    assert list(chain(*parts)) == list(range(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(num_images=st.integers(0, 100), batch_size=sizes, world_size=st.integers(1, 8))
def test_evaluation_shows_every_image_once(num_images, batch_size, world_size):
    ranks = [
        evaluation_batches(num_images, batch_size, rank, world_size) for rank in range(world_size)
    ]
    assert sorted(chain(*chain(*ranks))) == list(range(num_images))
    assert all(0 < len(batch) <= batch_size for rank in ranks for batch in rank)
    # The same images are together whatever the number of ranks, so their padding is the same.
    (alone,) = [evaluation_batches(num_images, batch_size, 0, 1)]
    assert sorted(chain(*ranks)) == alone


def test_seeds_of_samples_are_different_and_fit_an_int64():
    drawn = {
        sample_seed(seed, epoch, index)
        for seed in range(5)
        for epoch in range(20)
        for index in range(200)
    }
    assert len(drawn) == 5 * 20 * 200
    assert min(drawn) >= 0
    assert max(drawn) < 2**63


def test_every_bit_of_a_seed_is_set_half_the_time():
    drawn = np.array([sample_seed(0, epoch, index) for epoch in range(20) for index in range(500)])
    share = ((drawn[:, None] >> np.arange(63)) & 1).mean(axis=0)
    assert np.abs(share - 0.5).max() < 0.025  # five standard deviations of 10,000 draws


@settings(max_examples=30)
@given(seed=st.integers(0, 2**63 - 1), low=st.integers(-5, 5), num_values=st.integers(1, 20))
def test_draws_stay_in_their_range_and_repeat(seed, low, num_values):
    high = low + num_values - 1
    first, second = Draws(seed), Draws(seed)

    integers = [first.integer(low, high) for _ in range(50)]

    assert all(low <= number <= high for number in integers)
    assert integers == [second.integer(low, high) for _ in range(50)]
    assert all(0 <= first.fraction() < 1 for _ in range(50))


def test_first_draws_of_neighbouring_samples_are_uniform():
    # Flips and sizes of one epoch are the first draws of consecutive samples.
    draws = [Draws(sample_seed(1, 0, index)) for index in range(20_000)]
    fractions = np.array([one.fraction() for one in draws])
    integers = np.array([one.integer(0, 10) for one in draws])
    assert abs(fractions.mean() - 0.5) < 0.01  # five standard deviations: 0.0102
    assert abs(np.corrcoef(fractions[:-1], fractions[1:])[0, 1]) < 0.035
    assert abs(np.corrcoef(fractions, integers)[0, 1]) < 0.035
    assert np.abs(np.bincount(integers, minlength=11) - 20_000 / 11).max() < 205


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingOrder(0, 0, 2), "no images"),
        (lambda: TrainingOrder(0, 5, 0), "total_batch_size=0"),
        (lambda: TrainingOrder(0, 5, 2).micro_batch_positions(0, 2, 2, 1), "rank=2"),
        (lambda: TrainingOrder(0, 5, 2).micro_batch_positions(0, 0, 1, 0), "micro_batch_size=0"),
        (lambda: TrainingOrder(0, 5, 2).micro_batch_positions(0, 0, 3, 1), "fewer ranks"),
        (lambda: evaluation_batches(5, 0, 0, 1), "batch_size=0"),
        (lambda: evaluation_batches(5, 1, -1, 1), "rank=-1"),
        (lambda: Draws(0).integer(3, 2), r"\[3, 2\]"),
    ],
)
def test_impossible_numbers_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(
    seed=seeds, epoch=st.integers(0, 100), image=st.integers(0, 39), attempt=st.integers(0, 5),
    more=st.integers(1, 40),
)  # fmt: skip
def test_a_replacement_is_its_definition_and_never_the_broken_image(
    seed, epoch, image, attempt, more
):
    num_images = image + more + 1
    # Purpose 3, then the epoch, then the image, then the attempt: each selects from the stream of
    # what came before.
    state = 0
    for value in (seed, 3, epoch, image, attempt):
        state = splitmix64(state, value)
    offset = 1 + (state * (num_images - 1)) // 2**64

    found = replacement_index(seed, epoch, image, attempt, num_images)

    assert found == (image + offset) % num_images
    assert found != image
    assert 0 <= found < num_images


def test_every_other_image_replaces_a_broken_one_as_often():
    found = [replacement_index(0, 0, 2, attempt, 5) for attempt in range(4000)]
    counts = np.bincount(found, minlength=5)
    assert counts[2] == 0
    assert np.abs(counts[[0, 1, 3, 4]] - 1000).max() < 140  # five standard deviations


@given(seed=st.integers(0, 2**63 - 1), values=st.lists(st.integers(), min_size=1, max_size=20))
def test_a_choice_is_the_value_at_a_drawn_place(seed, values):
    draws, places = Draws(seed), Draws(seed)
    for _ in range(10):
        assert draws.choice(values) == values[places.integer(0, len(values) - 1)]


@given(seed=st.integers(0, 2**63 - 1))
def test_draws_are_the_stream_of_their_seed(seed):
    draws = Draws(seed)
    assert draws.fraction() == (splitmix64(seed, 0) // 2**11) / 2**53
    assert draws.integer(-3, 8) == -3 + splitmix64(seed, 1) * 12 // 2**64
    assert draws.integer(5, 5) == 5
    assert draws.fraction() == (splitmix64(seed, 3) // 2**11) / 2**53


def test_what_is_refused_says_what_is_possible():
    with pytest.raises(ValueError, match="rank") as caught:
        evaluation_batches(5, 1, 3, 3)
    assert str(caught.value) == "rank=3 is not one of the 3 ranks 0 .. 2"
    with pytest.raises(ValueError, match="fewer ranks") as caught:
        TrainingOrder(0, 5, 2).micro_batch_positions(0, 0, 3, 1)
    assert str(caught.value).endswith(
        "without images; use fewer ranks, or a larger total_batch_size"
    )
    with pytest.raises(ValueError, match="no images") as caught:
        TrainingOrder(0, 0, 2)
    assert str(caught.value) == (
        "the training data set has no images; check its path and annotations"
    )
