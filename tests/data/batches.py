"""Global batches of a training: what each holds, whatever ranks and workers read it."""

from ds_cmli.data.pairs import loader
from ds_cmli.data.sampler import GlobalBatchSampler


def run(data, ranks, workers, state, steps, batch=8):
    """Return what each global batch holds, in order, and the sampler's state afterwards."""
    samplers = [GlobalBatchSampler(data.order, batch // ranks, rank, ranks, 5) for rank in range(ranks)]
    for sampler in samplers:
        if state:
            sampler.load_state_dict(state)
    loaders = [iter(loader(data.train, data.collate, workers, batch_sampler=sampler)) for sampler in samplers]
    seen = []
    for _ in range(steps):
        for loaded, sampler in zip(loaders, samplers, strict=True):
            batch = next(loaded)
            sampler.advance()
            rows = zip(batch.index, batch.pair_id, batch.image, strict=True)
            seen += [(int(i), *pair.tolist(), int(image.long().sum())) for i, pair, image in rows]
    return seen, samplers[0].state_dict()


def global_batches(seen, batch=8):
    return [sorted(seen[start : start + batch]) for start in range(0, len(seen), batch)]
