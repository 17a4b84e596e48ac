import pytest
import torch

from loftq.lab.text import demo_text, windows


def test_no_line_of_the_evaluation_part_is_in_the_training_part():
    training, evaluation = (set(part.split("\n")) - {""} for part in demo_text())
    assert len(training) > 50
    assert len(evaluation) > 20
    assert not training & evaluation


def test_windows_are_whole_and_in_order():
    assert windows(torch.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="2 tokens, fewer than one window of 3"):
        windows(torch.arange(2), 3)
