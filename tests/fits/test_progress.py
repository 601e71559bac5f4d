"""When a program's optimizers have done enough."""

import gc
import weakref

import pytest
import torch

from ds_cmli.fits.progress import MORE, PASSES, Progress


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)


def steps(every: int, enough: int = 2) -> tuple[int, Progress]:
    """The steps of an optimizer beside one that steps after each `every` ones, until the end."""
    often, seldom, progress = optimizer(), optimizer(), Progress(enough)
    for number in range(1, 1000):
        for item in (often, seldom):
            if item is often or number % every == 0:
                progress.backward += 1
                if progress.ends_after_step(item):
                    return number, progress
    raise AssertionError


@pytest.mark.parametrize(
    "every, ends, waited_for", [(1, 2, []), (5, 10, []), (8, 16, []), (12, 2 + MORE, []), (99, 2 + MORE, ["SGD"])]
)
def test_the_others_have_some_steps_to_do_theirs(every, ends, waited_for):
    number, progress = steps(every)
    assert (number, progress.over, progress.waited_for) == (ends, True, waited_for)


def test_a_step_without_a_backward_pass_does_not_count():
    progress, alone = Progress(2), optimizer()
    progress.backward = 0
    assert [progress.ends_after_step(alone) for _ in range(3)] == [False] * 3
    progress.backward = 1
    assert progress.ends_after_step(alone) and not progress.waited_for


def test_looking_for_optimizers_keeps_no_tensor():
    progress, stepping, tensor = Progress(2), optimizer(), torch.ones(1)
    ended = weakref.ref(tensor)
    gc.disable()
    try:
        for number in range(PASSES):
            progress.backward = number
            assert not progress.ends_before_forward()
        assert stepping.param_groups
        del tensor
        assert ended() is None
    finally:
        gc.enable()
