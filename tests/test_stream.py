"""The order of pictures: full batches of one bucket, fair shares, exact rounds, and nothing that depends on the past."""

from __future__ import annotations

import pickle
import random
import time
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lycoris_diff import AdapterError
from lycoris_diff.training.data.buckets import Bucket
from lycoris_diff.training.data.stream import Stream, sample_generator, take_turns

BUCKETS = [Bucket(64, 64), Bucket(96, 64), Bucket(64, 96), Bucket(128, 64)]

pictures = st.lists(st.tuples(st.sampled_from(BUCKETS), st.integers(1, 4)), min_size=1, max_size=9)
sizes = st.integers(1, 6)
seeds = st.integers(0, 2**32 - 1)


def make(data, batch_size, seed):
    return Stream([bucket for bucket, _ in data], [repeats for _, repeats in data], batch_size, seed)


def weights(data):
    """Samples of a round by bucket."""
    total = Counter()
    for bucket, repeats in data:
        total[bucket] += repeats
    return total


@given(pictures, sizes, seeds)
def test_every_batch_is_full_and_of_one_bucket(data, batch_size, seed):
    stream = make(data, batch_size, seed)
    for number in range(30):
        batch = stream.batch(number)
        assert [draw.number for draw in batch.draws] == list(range(number * batch_size, (number + 1) * batch_size))
        assert {data[draw.index][0] for draw in batch.draws} == {batch.bucket}


@given(pictures, sizes, seeds)
def test_service_is_proportional_at_every_moment(data, batch_size, seed):
    stream, share = make(data, batch_size, seed), weights(data)
    served = Counter()
    for number in range(1, 2 * share.total() + 2):
        served[stream.batch(number - 1).bucket] += 1
        for bucket, weight in share.items():
            assert abs(served[bucket] - Fraction(number * weight, share.total())) < 1


@settings(max_examples=50)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40))
def test_turns_are_never_a_whole_turn_early_or_late(shares):
    turns = take_turns(shares, 400)
    had = [0] * len(shares)
    for now, (chosen, before) in enumerate(turns, 1):
        assert before == had[chosen]
        had[chosen] += 1
        assert all(abs(count - Fraction(now * share, sum(shares))) < 1 for count, share in zip(had, shares))


@given(pictures, sizes, seeds)
def test_a_round_shows_every_picture_as_often_as_its_repeats_say(data, batch_size, seed):
    stream, share = make(data, batch_size, seed), weights(data)
    shown = {bucket: [] for bucket in share}
    for number in range(share.total()):
        batch = stream.batch(number)
        shown[batch.bucket] += [draw.index for draw in batch.draws]
    for bucket, weight in share.items():
        expected = Counter({index: repeats for index, (own, repeats) in enumerate(data) if own == bucket})
        assert len(shown[bucket]) == weight * batch_size
        for start in range(0, len(shown[bucket]), weight):
            assert Counter(shown[bucket][start : start + weight]) == expected


@given(pictures, sizes, seeds, st.lists(st.integers(0, 200), max_size=12))
def test_a_batch_depends_on_its_number_only(data, batch_size, seed, numbers):
    used = make(data, batch_size, seed)
    for number in numbers:
        assert used.batch(number) == make(data, batch_size, seed).batch(number)
        assert used.batch(number) == used.batch(number)


@given(pictures, st.integers(1, 3), seeds, st.integers(2, 4), st.integers(0, 50))
def test_processes_share_the_batches_of_one(data, batch_size, seed, world, start):
    """Each process has a stream of its own; the last of them is resumed at `start` and has seen nothing before."""
    alone = make(data, world * batch_size, seed)
    streams = [make(data, world * batch_size, seed) for _ in range(world)]
    for number in range(start):
        alone.batch(number), *(stream.batch(number) for stream in streams[:-1])
    for number in range(start, start + 5):
        parts = [stream.batch(number).draws[rank::world] for rank, stream in enumerate(streams)]
        assert {len(part) for part in parts} == {batch_size}
        assert {stream.batch(number).bucket for stream in streams} == {alone.batch(number).bucket}
        together = sorted((draw for part in parts for draw in part), key=lambda draw: draw.number)
        assert tuple(together) == alone.batch(number).draws


def test_the_order_of_a_bucket_does_not_depend_on_the_others():
    one = Stream([BUCKETS[0]] * 5, [1] * 5, 5, 7)
    more = Stream([BUCKETS[0]] * 5 + [BUCKETS[1]] * 5, [1] * 10, 5, 7)
    both = [more.batch(number) for number in range(8)]
    first = [[draw.index for draw in batch.draws] for batch in both if batch.bucket == BUCKETS[0]]
    assert first == [[draw.index for draw in one.batch(number).draws] for number in range(4)]


def test_rounds_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(draw.index for draw in Stream([BUCKETS[0]] * 8, [1] * 8, 8, seed).batch(number).draws)
        for seed in range(5)
        for number in range(5)
    }
    assert len(orders) == 25


def test_every_order_of_a_round_is_as_likely():
    stream = Stream([BUCKETS[0]] * 3, [1] * 3, 3, 0)
    counts = Counter(tuple(draw.index for draw in stream.batch(number).draws) for number in range(3000))
    assert len(counts) == 6
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 25  # chi squared, 5 degrees: p > 1e-4


def test_distant_batches_and_large_sets_are_found_fast():
    buckets = [Bucket(64 * (1 + index % 30), 64) for index in range(10_007)]
    stream = Stream(buckets, [1 + index % 3 for index in range(10_007)], 16, 0)
    start = time.perf_counter()
    batch = stream.batch(10**12 + 12_345)
    assert time.perf_counter() - start < 5
    assert {buckets[draw.index] for draw in batch.draws} == {batch.bucket}
    assert batch.draws[0].number == 16 * (10**12 + 12_345)


def test_a_stream_goes_to_other_processes():
    stream = Stream(BUCKETS, [2] * 4, 3, 1)
    stream.batch(5)
    copied = pickle.loads(pickle.dumps(stream))
    assert [copied.batch(number) for number in range(20)] == [stream.batch(number) for number in range(20)]


@pytest.mark.parametrize(
    ("buckets", "repeats", "batch_size", "words"),
    [
        ([], [], 1, "at least one picture"),
        (BUCKETS[:2], [1], 1, "2 buckets and 1 repeats"),
        (BUCKETS[:2], [1, 0], 1, "repeats of picture 1 is 0"),
        (BUCKETS[:1], [1], 0, "batch_size is 0"),
    ],
)
def test_impossible_streams_are_refused(buckets, repeats, batch_size, words):
    with pytest.raises(AdapterError, match=words):
        Stream(buckets, repeats, batch_size, 0)


def test_negative_batches_are_refused():
    with pytest.raises(AdapterError, match="batch -1"):
        Stream(BUCKETS[:1], [1], 1, 0).batch(-1)


def test_sample_generators_differ_in_every_argument_and_leave_torch_alone():
    state = torch.get_rng_state()
    cases = [(seed, role, number) for seed in (0, 1, 10) for role in ("noise", "noise 1", "1") for number in range(120)]
    first = {case: tuple(torch.rand(2, generator=sample_generator(*case)).tolist()) for case in cases}
    assert len(set(first.values())) == len(cases)
    random.Random(0).shuffle(cases)
    assert all(first[case] == tuple(torch.rand(2, generator=sample_generator(*case)).tolist()) for case in cases)
    assert torch.equal(torch.get_rng_state(), state)


def test_first_values_of_consecutive_generators_are_uniform_and_uncorrelated():
    values = torch.stack([torch.rand(3, generator=sample_generator(3, "sample", number)) for number in range(4000)]).double()
    assert (values.mean(0) - 0.5).abs().max() < 0.02
    counts = torch.histc(values[:, 0], 10, 0, 1)
    assert ((counts - 400) ** 2 / 400).sum() < 34  # 9 degrees: p > 1e-4
    neighbours = torch.corrcoef(torch.stack([values[:-1, 0], values[1:, 0], values[:-1, 1], values[:-1, 2]]))
    assert (neighbours - torch.eye(4)).abs().max() < 0.07
