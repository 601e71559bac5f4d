"""The rank that needs the most: its prediction, and of others what its events show."""

from collections.abc import Mapping

from ds_cmli.common.json_text import Section
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.fake_cuda.answer import Room, on_device
from ds_cmli.memory.predict import DEFAULT_GPU, PLAIN, Options, Prediction, predict
from ds_cmli.memory.shares import requested_peak

UNKNOWN = 2**63  # more than any rank needs
REPLAYED = 8  # ranks whose events go through the allocator's model: those that request the most
MOST_RANKS = 5  # that are predicted, if what they need follows from each other
MOST_EACH = 32  # that are predicted if it does not
NEGLIGIBLE = 4096  # bytes by which what follows may differ


def predict_largest(
    config: Config,
    ds_config: Section,
    world_size: int,
    *,
    target: str = "cuda",
    gpu: str = DEFAULT_GPU,
    first: int | None = None,
    options: Options = PLAIN,
) -> Prediction:
    """Predict the rank that needs the most: on the device, or for a CPU of requested bytes.

    The events of one predicted rank show what each other one needs: only a rank that needs more is
    predicted too. Where two predictions contradict this, every rank is predicted. Arguments as in
    `predict`.

    Args:
        first: the rank to begin with. None: with ZeRO-1 and 2 the last one, whose gradients are
            computed while most activations are stored, then the first and the middle one.
    """
    total = "requested" if target == "cpu" else "device"
    ranks = _to_begin_with(DeepSpeedConfig.of(ds_config), world_size, first)
    predictions: dict[int, Prediction] = {}
    while True:
        for rank in ranks:
            predictions[rank] = predict(
                config, ds_config, world_size, target=target, gpu=gpu, rank=rank, options=options
            )
        most = max(predictions.values(), key=lambda prediction: prediction.report.totals[total])
        if _contradicted(predictions) and len(predictions) < min(world_size, MOST_EACH):
            step = max(1, world_size // MOST_EACH)
            ranks = [rank for rank in range(0, world_size, step) if rank not in predictions]
            continue
        others = _of_other_ranks(most, total, Room(gpu, options.limit), world_size)
        rank = max(others.keys() - predictions, key=others.__getitem__, default=-1)
        if len(predictions) >= MOST_RANKS or others.get(rank, 0) <= most.report.totals[total]:
            return most
        ranks = [rank]


def _to_begin_with(ds_config: DeepSpeedConfig, world_size: int, first: int | None) -> list[int]:
    """The ranks that are predicted in any case."""
    last, middle = world_size - 1, world_size // 2
    if ds_config.stage not in (1, 2):
        return [first or 0]
    if first is None:
        return list(dict.fromkeys([last, 0, middle]))
    # Of these, one rank's events show what the others need.
    follow = ds_config.stage == 2 and ds_config.zero.get("contiguous_gradients", True)
    return [first] if follow else list(dict.fromkeys([first, 0]))


def _contradicted(predictions: Mapping[int, Prediction]) -> bool:
    """Whether a predicted rank needs other memory than another one's events say."""
    for one in predictions.values():
        if not one.shares.elements:
            continue
        for rank, other in predictions.items():
            said = requested_peak(one.shares.events(one.events, rank))
            if abs(said - other.report.totals["requested"]) > NEGLIGIBLE:
                return True
    return False


def _of_other_ranks(
    prediction: Prediction, total: str, room: Room, world_size: int
) -> dict[int, int]:
    """The totals of those ranks that request the most, by the events of the predicted one."""
    shares = prediction.shares
    if shares.elements and not any(shares.elements[shares.rank].values()):
        return {0: UNKNOWN}  # of a rank without any parameter nothing follows
    events, sizes = {}, {}
    for rank in shares.kinds():
        events[rank] = shares.events(prediction.events, rank)
        sizes[rank] = requested_peak(events[rank])
    if total == "requested":
        return sizes
    occupied = {}
    for rank in sorted(sizes, key=sizes.__getitem__, reverse=True)[:REPLAYED]:
        _, occupied[rank] = on_device(events[rank], room, world_size)
    return occupied
