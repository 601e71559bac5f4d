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
    often, seldom, progress, model = optimizer(), optimizer(), Progress(enough), torch.nn.ReLU()
    for number in range(1, 1000):
        if progress.ends_before(model) or progress.ends_before(torch.nn.GELU()):
            return number - 1, progress
        for item in (often, seldom):
            if item is often or number % every == 0:
                progress.backward += 1
                assert not progress.ends_after_step(item)
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
    assert not progress.ends_after_step(alone) and progress.steps == 2 and not progress.waited_for
    progress.backward = 2
    assert progress.ends_after_step(alone)  # a program of functions: no module has begun the step


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


@pytest.mark.parametrize("again", [1, 2, 3])
def test_a_step_in_which_a_module_runs_more_often_is_another_kind(again):
    progress, alone, model = Progress(2), optimizer(), torch.nn.Linear(1, 1)
    for number in range(100):
        if any([progress.ends_before(model) for _ in range(1 + again * (number % 8 == 0))]):
            break
        progress.backward += 1
        assert not progress.ends_after_step(alone)
    assert number == 9 and not progress.once


def test_each_kind_of_step_comes_twice():
    """A penalty in the first of each four steps has a module of its own; two steps are asked for."""
    progress, alone, usual, penalty = Progress(2), optimizer(), torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for number in range(100):
        modules = (usual, penalty) if number % 4 == 0 else (usual,)
        if any([progress.ends_before(module) for module in modules]):
            break
        progress.backward += 1
        assert not progress.ends_after_step(alone)
    assert number == 5 and not progress.once
    progress, seldom = Progress(2), torch.nn.Linear(1, 1)
    for number in range(100):
        if any([progress.ends_before(module) for module in ((seldom, usual) if not number else (usual,))]):
            break
        progress.backward += 1
        assert not progress.ends_after_step(alone)
    assert number == 2 + MORE
    [seen, once] = progress.ending(saved=False)
    names = "an evaluation, saving, inputs of another size, steps of another kind"
    assert seen == f"not seen until then: {names}; give more --steps if one may need more"
    assert once == "1 kind of step came once, by the modules that ran: give more --steps"


def test_an_optimizer_that_steps_once_for_each_group():
    """As DeepSpeed's, which also steps before the first pass, with gradients of zeros."""
    progress, alone, model, other = Progress(1), optimizer(), torch.nn.Linear(1, 1), torch.nn.Parameter(torch.ones(1))
    alone.add_param_group({"params": [other]})
    groups = alone.param_groups

    def all_groups() -> None:
        for group in groups:
            alone.param_groups = [group]
            assert not progress.ends_after_step(alone)

    all_groups()
    assert not progress.done and not progress.ends_before(model)
    progress.backward += 1
    all_groups()
    assert progress.steps == 1 and len(progress.done) == 2 and progress.ends_before(model)


@pytest.mark.parametrize("rows, differ", [((8, 8), False), ((8, 5), True), ((5, 8), True)])
def test_inputs_of_different_sizes_are_told(rows, differ):
    """Of the same kind of step, as with growing texts, or a smaller last batch."""
    progress, alone, model = Progress(2), optimizer(), torch.nn.Linear(1, 1)
    for number in rows:
        assert not progress.ends_before(model, (torch.ones(number, 1), None))
        progress.backward += 1
        assert not progress.ends_after_step(alone)
    assert progress.ends_before(model, (torch.ones(99, 1),))
    seen, *sizes = progress.ending(saved=False)
    assert ("inputs of another size" in seen) is not differ
    assert sizes == ["steps had inputs of different sizes: if larger ones follow, give more --steps"] * differ


def test_an_evaluation_is_followed_for_a_while(monkeypatch):
    progress, alone, model = Progress(1), optimizer(), torch.nn.Linear(1, 1)
    assert not progress.ends_before(model) and not progress.ends_with(KeyError("early"))
    progress.backward = 0
    assert not progress.ends_after_step(alone) and not progress.evaluated
    with torch.no_grad():
        assert not progress.ends_before(model) and progress.evaluated
        monkeypatch.setattr("ds_cmli.fits.progress.AFTER_S", 0.0)
        assert progress.ends_before(model) and progress.too_long
    assert progress.ends_with(KeyError("late")) and progress.error == "KeyError: 'late'"
    assert [*progress.ending()][1:] == [
        "not counted: what follows the steps, after 0 s of it",
        "not counted: what follows the steps, which ended in KeyError: 'late'",
    ]
