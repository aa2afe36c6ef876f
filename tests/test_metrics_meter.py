"""Batches and processes against all items at once."""

from __future__ import annotations

import doctest
import socket

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, multiprocessing

from osml_plugin.errors import OsmlError
from osml_plugin.metrics import OpenSetMeter, meter, open_set_metrics


def items_of(seed, n, decided=True):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 20, n) / 4
    items = [scores, rng.integers(-1, 3, n), rng.integers(0, 3, n)]
    return [*items, scores > 2] if decided else items


def same(found, expected):
    """Equal, but that NaN is NaN in any process."""
    assert found.to_dict() == expected.to_dict()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 15), min_size=1, max_size=6), st.booleans(), st.booleans())
def test_batches_and_merged_meters_give_the_metrics_of_all_items_at_once(seed, sizes, decided, tensors):
    items = items_of(seed, sum(sizes), decided)
    meters = OpenSetMeter(), OpenSetMeter()
    for i, end in enumerate(np.cumsum(sizes)):
        batch = [values[end - sizes[i] : end] for values in items]
        meters[i % 2].update(*(map(torch.tensor, batch) if tensors else batch))
    meters[0].merge(meters[1])
    for _ in range(2):  # to compute changes nothing
        same(meters[0].compute(), open_set_metrics(*items))


def test_a_meter_keeps_its_own_copy_and_forgets_when_reset():
    items = items_of(0, 30)
    kept = OpenSetMeter()
    buffers = [values.copy() for values in items]
    kept.update(*buffers)
    for buffer in buffers:
        buffer[:] = 0
    same(kept.compute(), open_set_metrics(*items))
    kept.reset()
    with pytest.raises(OsmlError, match="has no items"):
        kept.compute()


def test_a_merged_meter_leaves_the_other_as_it_was():
    one, other, items = OpenSetMeter(), OpenSetMeter(), items_of(1, 20)
    one.update(*items)
    other.update(*items)
    one.merge(other)
    one.update(*items)
    same(other.compute(), open_set_metrics(*items))


def test_bad_batches_are_refused_and_leave_the_meter_as_it_was():
    items = items_of(2, 10)
    kept = OpenSetMeter()
    kept.update(*items)
    for bad, message in (
        (items[:3], "some batches only"),
        ((items[0], items[1], items[2][:5], items[3]), "lengths differ"),
        ((items[0] * np.nan, *items[1:]), "10 NaN"),
    ):
        with pytest.raises(OsmlError, match=message):
            kept.update(*bad)
    undecided = OpenSetMeter()
    undecided.update(*items[:3])
    with pytest.raises(OsmlError, match="some batches only"):
        kept.merge(undecided)
    same(kept.compute(), open_set_metrics(*items))


ROUNDS = ((40, 23), (40, 0))
"""Items of each process; one may have no batch at all."""


def process(rank, port, answers):
    """One of two processes: its own items only; compute must be called by both."""
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    kept, found = OpenSetMeter(), []
    for sizes in ROUNDS:
        items = items_of(rank, sizes[rank])
        for start in range(0, sizes[rank], 7):
            kept.update(*(values[start : start + 7] for values in items))
        found += [kept.compute().to_dict() for _ in range(2)]  # to compute changes nothing
        kept.reset()
    answers.put((rank, found))
    distributed.barrier()
    distributed.destroy_process_group()


def test_two_processes_give_the_metrics_of_all_items_to_both():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(process, (port, answers), nprocs=2)
    expected = []
    for sizes in ROUNDS:
        parts = [items_of(rank, size) for rank, size in enumerate(sizes)]
        expected += [open_set_metrics(*map(np.concatenate, zip(*parts, strict=True))).to_dict()] * 2
    assert dict(answers.get() for _ in range(2)) == {0: expected, 1: expected}


def test_the_example_in_the_docstring():
    assert doctest.testmod(meter) == (0, 4)
