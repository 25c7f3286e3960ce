"""The quality of one model, or of several by name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fleetune.engine.pending_rounds import PendingQuality
from fleetune.training.evaluate import EvalSums


@dataclass
class Begun:
    """An evaluation of two chunks of two tokens and two examples each."""

    loss: float
    num_correct: int | None = 1
    is_over: bool = True

    def is_done(self) -> bool:
        """As it was made."""
        return self.is_over

    def sums(self) -> list[EvalSums]:
        """The same in both chunks."""
        return [EvalSums(loss=2 * self.loss, num_tokens=2, num_answers=2, num_correct=self.num_correct)] * 2


def test_one_model_has_no_name():
    assert PendingQuality({"": Begun(3.0)}).quality() == {"eval_loss": 3.0, "eval_accuracy": 0.5}


def test_the_quality_of_several_is_their_mean():
    """Losses 1 and 3, accuracies 0.5 and 1."""
    assert PendingQuality({"a": Begun(1.0), "b": Begun(3.0, num_correct=2)}).quality() == {
        "eval_loss": 2.0,
        "eval_accuracy": 0.75,
        "eval_loss/a": 1.0,
        "eval_accuracy/a": 0.5,
        "eval_loss/b": 3.0,
        "eval_accuracy/b": 1.0,
    }


def test_the_main_one_is_the_runs():
    found = PendingQuality({"main": Begun(1.0, None), "a": Begun(3.0, None), "b": Begun(9.0, None)}).quality()
    assert found == {"eval_loss": 1.0, "eval_loss/a": 3.0, "eval_loss/b": 9.0}


@pytest.mark.parametrize("over", [(True, True), (True, False), (False, False)])
def test_several_are_done_when_all_are(over: tuple[bool, bool]):
    pending = PendingQuality({"a": Begun(1.0, is_over=over[0]), "b": Begun(1.0, is_over=over[1])})
    assert pending.is_done() == all(over)
    pending.quality()  # waits
    assert pending.is_done()


def test_an_evaluation_of_two_names_is_waited_for_once():
    """Its sums are handed out once, and then they are gone."""

    class Once(Begun):
        def sums(self) -> list[EvalSums]:
            assert self.is_over
            self.is_over = False
            return super().sums()

    shared = Once(1.0, None)
    found = PendingQuality({"main": shared, "stay": shared, "deep": Begun(3.0, None)}).quality()
    assert found == {"eval_loss": 1.0, "eval_loss/stay": 1.0, "eval_loss/deep": 3.0}
