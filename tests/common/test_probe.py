"""What training reports reaches every subscriber, and without one nothing changes."""

from contextlib import contextmanager

from ds_cmli.common.probe import Probe


class Listener(Probe):
    def __init__(self, name, log):
        self.name, self.log = name, log

    @contextmanager
    def scope(self, category):
        self.log.append(f"{self.name} in {category}")
        with super().scope(category):
            yield
        self.log.append(f"{self.name} out")


def test_without_a_subscriber_nothing_happens():
    probe = Probe()
    with probe.scope("data"), probe.step_phase("backward"), probe.exchanging(), probe.losses():
        pass


def test_every_subscriber_is_told_the_last_one_first():
    probe, log = Probe(), []
    a, b = Listener("a", log), Listener("b", log)
    with probe.subscribed(a), probe.subscribed(b), probe.scope("data"):
        log.append("inside")
    with probe.scope("data"):
        pass
    assert log == ["b in data", "a in data", "inside", "a out", "b out"]


def test_what_a_subscriber_does_not_override_goes_on_to_the_one_below():
    probe, log = Probe(), []
    with probe.subscribed(Listener("a", log)), probe.subscribed(Probe()), probe.scope("data"):
        pass
    assert log == ["a in data", "a out"]


def test_a_subscriber_may_end_before_those_that_came_after_it():
    probe, log = Probe(), []
    first, second = (probe.subscribed(Listener(name, log)) for name in "ab")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with probe.scope("data"):
        pass
    second.__exit__(None, None, None)
    with probe.scope("data"):
        pass
    assert log == ["b in data", "b out"]
