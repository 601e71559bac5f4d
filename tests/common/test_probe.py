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

    def alike(self, function, *arguments):
        self.log.append(f"{self.name} {arguments}")
        return super().alike(function, *arguments)


class OneMore(Probe):
    def alike(self, function, *arguments):
        return super().alike(function, *arguments) + 1


def test_without_a_subscriber_training_does_what_it_says():
    probe, x = Probe(), torch.zeros(2)
    with probe.scope("data"), probe.step_phase("backward"), probe.exchanging(), probe.losses():
        assert probe.alike(max, 1, 2) == 2
    assert probe.to_device(x, "cpu") is x and not probe.on_gpu(x.device)


def test_every_subscriber_is_told_the_last_one_first():
    probe, log = Probe(), []
    a, b = Recorder("a", log), Recorder("b", log)
    with probe.subscribed(a), probe.subscribed(b), probe.scope("data"):
        probe.alike(max, 1, 2)
    with probe.scope("data"):
        pass
    assert log == ["b in data", "a in data", "b (1, 2)", "a (1, 2)", "a out", "b out"]


def test_what_a_subscriber_does_not_override_goes_on_to_the_one_below():
    probe, log = Probe(), []
    with probe.subscribed(OneMore()), probe.subscribed(Recorder("a", log)):
        assert not probe.on_gpu(torch.device("cpu"))
        assert probe.alike(max, 1, 2) == 3
    assert probe.alike(max, 1, 2) == 2


def test_a_subscriber_may_end_before_those_that_came_after_it():
    probe, log = Probe(), []
    first, second = (probe.subscribed(Recorder(name, log)) for name in "ab")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    probe.alike(abs, 1)
    second.__exit__(None, None, None)
    probe.alike(abs, 2)
    assert log == ["b (1,)"]
