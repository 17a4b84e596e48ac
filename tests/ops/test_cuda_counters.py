"""Counters of the CUDA product: launches that may overlap never share a pair."""

import torch

from loftq.ops.cuda import counters as module
from loftq.ops.cuda.counters import counters

CPU = torch.device("cpu")


def test_a_captured_launch_keeps_its_pair_and_the_others_take_turns(monkeypatch):
    monkeypatch.setattr(module, "_pools", {})
    monkeypatch.setattr(module, "ROUND", 3)
    monkeypatch.setattr(module, "KEPT", 2)
    turns = [counters(CPU, False).data_ptr() for _ in range(7)]
    assert len(set(turns[:3])) == 3
    assert turns[:3] == turns[3:6]
    kept = [counters(CPU, True) for _ in range(4)]  # two of the pool, then pairs of their own
    assert len({pair.data_ptr() for pair in kept} | set(turns)) == 7
    assert all(pair.tolist() == [0, 0] for pair in kept)


def test_a_first_launch_that_is_captured_makes_no_pool(monkeypatch):
    """Zeros of a pool made while capturing would be written by a replay only."""
    monkeypatch.setattr(module, "_pools", {})
    assert counters(CPU, True).tolist() == [0, 0]
    assert module._pools == {}
