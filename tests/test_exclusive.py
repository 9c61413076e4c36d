"""Turns: one at a time, and none that is lost for ever."""

from __future__ import annotations

import pytest

from pipeline.errors import PipelineError
from pipeline.exclusive import Turn, Turns


def test_turn_is_refused_while_somebody_has_it() -> None:
    turns = Turns()
    assert not turns
    with Turn(turns, "busy"):
        assert turns
        with pytest.raises(PipelineError, match="busy"), Turn(turns, "busy"):
            pytest.fail("two at once")
        assert turns, "who was refused has ended nothing"
    assert not turns
    with Turn(turns, "busy"):
        assert turns


def test_turn_of_a_holder_that_was_lost_ends_with_it() -> None:
    turns = Turns()
    lost = Turn(turns, "busy")
    lost.__enter__()
    assert turns
    del lost
    assert not turns
