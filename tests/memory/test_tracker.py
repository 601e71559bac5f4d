"""The tracker on real CPU tensors, against sizes known by hand."""

import pytest
import torch

from ds_cmli import engine
from ds_cmli.cmli import cmli_scores
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.distributed import process_group as distributed
from ds_cmli.memory.inputs import longest_batch
from ds_cmli.memory.tracker import MemoryTracker
from ds_cmli.memory_model import gpus


def live(tracker: MemoryTracker) -> dict[str, int]:
    by_name: dict[str, int] = {}
    for event in tracker.events():
        by_name[event.category] = by_name.get(event.category, 0) + event.bytes
    return {category: size for category, size in by_name.items() if size}


def test_storages_are_counted_once_from_their_birth_to_their_end():
    with MemoryTracker() as tracker:
        with tracker.scope("data"):
            a = torch.empty(100)
            view = a.view(10, 10)[3:]
        with tracker.scope("teacher"):
            b = a + 1
        assert live(tracker) == {"data": 400, "teacher": 400}
        del a
        assert live(tracker) == {"data": 400, "teacher": 400}  # the view holds the storage
        del view
        assert live(tracker) == {"teacher": 400}
        b.resize_(200)
        assert live(tracker) == {"teacher": 800}
        b.add_(1)
        del b
        assert live(tracker) == {}
    assert [event.bytes for event in tracker.events()] == [400, 400, -400, -400, 800, -800]


def test_what_a_gpu_s_operators_hold_inside_is_recorded_after_their_results():
    with MemoryTracker(gpu=gpus.find("A100 80GB").limits) as tracker:
        x = torch.empty(4096, 1536, dtype=torch.bfloat16)
        x.sum(0)
        x.bool().sum()
    assert [event.bytes for event in tracker.events()][1:] == [
        *(3072, 50_331_648, 48, -48, -50_331_648, -3072),
        *(x.numel(), 8, 8 * x.numel(), 432 * 8, 4, -4, -432 * 8, -8 * x.numel(), -x.numel(), -8),
    ]  # fmt: skip


def test_streams_and_an_emptied_cache_are_recorded_for_a_gpu_alone():
    def recorded(**options) -> list[tuple[int, int]]:
        with MemoryTracker(**options) as tracker:
            with tracker.on_stream("reduction"):
                a = torch.empty(100)
            tracker.record_emptied_cache()
            b = torch.empty(50)
            result = [(event.bytes, event.stream) for event in tracker.events()]
        del a, b
        return result

    assert recorded(gpu=gpus.find("A100 80GB").limits) == [(400, 1), (0, 0), (200, 0)]
    assert [size for size, _ in recorded()] == [400, 200]


def test_what_was_there_before_is_recorded_when_it_is_claimed():
    before = torch.empty(25)
    with MemoryTracker() as tracker:
        with tracker.paused():
            host = torch.empty(1000)
        tracker.claim("parameters", [before, before[5:], None])
        tracker.claim("gradients", [before])  # the first claim stays
        before + 0
        assert live(tracker) == {"parameters": 100}
        del host
    assert live(tracker) == {"parameters": 100}


def test_the_all_pairs_op_holds_what_it_allocates():
    image, text = torch.randn(8, 49, 32, requires_grad=True), torch.randn(12, 30, 32, requires_grad=True)
    mask = torch.ones(12, 30, dtype=torch.bool)
    with MemoryTracker() as tracker:
        tracker.claim("data", (image, text, mask))
        scores = cmli_scores(image, text, mask)
        # Both scores in fp32, and an argmax index of a byte for each patch and token of a pair.
        assert live(tracker)["CMLI op"] == 8 * 12 * (2 * 4 + 49 + 30)
        gradients = torch.autograd.grad([s.sum() for s in scores], (image, text))
        del scores
        assert "CMLI op" not in live(tracker)
    assert {x.shape for x in gradients} == {image.shape, text.shape}


@pytest.fixture(scope="module")
def tracked():
    """Two optimizer steps of the preset tiny under ZeRO-2 with checkpointing: tracker and train_engine."""
    config = load_preset("tiny", {"student": {"shared_blocks": 2}})
    ds_config = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000, "overlap_comm": False},
        "bf16": {"enabled": True},
        "activation_checkpointing": {},
    }
    ds_config = DeepSpeedConfig.of(ds_config).filled(config.optim, 1, 10)
    device = distributed.init()
    with MemoryTracker() as tracker:
        train_engine = engine.build(config, ds_config, 300, 10, device)
        with tracker.attach(train_engine):
            for _ in range(2):
                with tracker.scope("data"):
                    batch = longest_batch(config, 8)
                train_engine(batch)
                del batch
    distributed.shutdown()
    return tracker, train_engine


def test_a_step_leaves_what_training_keeps(tracked):
    tracker, train_engine = tracked
    padded = 2 * sum(-(-sum(p.numel() for p in group) // 2) for group in train_engine.engine.optimizer.bit16_groups)
    result = live(tracker)
    buffers = sum(b.nbytes for b in train_engine.objective.buffers())
    assert result["parameters"] == 2 * padded + buffers
    assert result["master weights"] == 4 * padded
    assert result["optimizer states"] == 2 * 4 * padded + 2 * 4  # two moments, and the count of each of two groups
    teacher = train_engine.teacher
    assert result["teacher"] == sum(t.nbytes for t in (*teacher.parameters(), *teacher.buffers()))
    assert "activations student" not in result and "data" not in result and "gradients" not in result


def test_a_step_has_every_category_in_its_phase(tracked):
    tracker, _ = tracked
    most: dict[tuple[str, str], int] = {}
    now: dict[str, int] = {}
    for event in tracker.events():
        now[event.category] = now.get(event.category, 0) + event.bytes
        place = (event.phase, event.category)
        most[place] = max(most.get(place, 0), now[event.category])
    assert any(e.bytes == 2 * 100_000 and e.category == "ZeRO buckets" for e in tracker.events())
    assert most["backward", "gradients"] > 0
    assert most["loss", "CMLI op"] > 0 and most["backward", "CMLI op"] > 0
    assert most["forward", "activations teacher"] > 0
    batch = longest_batch(load_preset("tiny", {}), 8)
    assert most["forward", "data"] == sum(v.nbytes for v in vars(batch).values() if isinstance(v, torch.Tensor))
    # Checkpointing keeps the inputs of blocks until backward, which computes one block's activations again.
    assert most["backward", "activations student"] > most["forward", "activations student"]
