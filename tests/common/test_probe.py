"""What training reports reaches every subscriber, and without one nothing changes."""

from contextlib import contextmanager

import torch

from ds_cmli.common.probe import Probe


class Recorder(Probe):
    def __init__(self, name, log):
        self.name, self.log = name, log

    @contextmanager
    def scope(self, category):
        self.log.append(f"{self.name} in {category}")
        with super().scope(category):
            yield
        self.log.append(f"{self.name} out")

    def texts_from(self, first):
        self.log.append(f"{self.name} {first}")
        super().texts_from(first)


class OnlyEven(Probe):
    def turns(self, items):
        return (item for item in super().turns(items) if item % 2 == 0)

    def alike(self, function, *arguments):
        return super().alike(function, *arguments) + 1


def test_without_a_subscriber_training_does_what_it_says():
    probe, x = Probe(), torch.zeros(2)
    with probe.scope("data"), probe.step_phase("backward"), probe.exchanging():
        probe.texts_from(3)
    assert list(probe.turns(range(3))) == [0, 1, 2]
    assert probe.alike(max, 1, 2) == 2
    assert probe.to_device(x, "cpu") is x and probe.to_host(x) is x
    probe.overwrite_on_host(x, torch.ones(2))
    assert x.tolist() == [1, 1]
    assert probe.read_shapes(torch.tensor([[1, 2], [3, 4]]), torch.Size([1, 2])) == [[1, 2], [3, 4]]


def test_every_subscriber_is_told_the_last_one_first():
    probe, log = Probe(), []
    a, b = Recorder("a", log), Recorder("b", log)
    with probe.subscribed(a), probe.subscribed(b), probe.scope("data"):
        probe.texts_from(7)
    with probe.scope("data"):
        pass
    assert log == ["b in data", "a in data", "b 7", "a 7", "a out", "b out"]


def test_what_a_subscriber_does_not_override_goes_on_to_the_one_below():
    probe, log = Probe(), []
    with probe.subscribed(OnlyEven()), probe.subscribed(Recorder("a", log)):
        assert list(probe.turns(range(5))) == [0, 2, 4]
        assert probe.alike(max, 1, 2) == 3
    assert list(probe.turns(range(3))) == [0, 1, 2]


def test_a_subscriber_may_end_before_those_that_came_after_it():
    probe, log = Probe(), []
    first, second = (probe.subscribed(Recorder(name, log)) for name in "ab")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    probe.texts_from(1)
    second.__exit__(None, None, None)
    probe.texts_from(2)
    assert log == ["b 1"]
