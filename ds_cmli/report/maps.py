"""Reads the match maps that a run has written for TensorBoard at its evaluations."""

from pathlib import Path

from ds_cmli.common.documents import data_url
from ds_cmli.trackers import MATCH_MAPS


def match_maps(folder: Path) -> dict[str, str]:
    """The last picture of each held-out pair: "<pair>, step <step>" -> `data:` URL. Empty if the
    run wrote none.
    """
    events = folder / "tensorboard"
    if not any(events.glob("events.*")):
        return {}
    from tensorboard.backend.event_processing import event_accumulator

    # Only the last of each is kept.
    kept = {event_accumulator.IMAGES: 1, event_accumulator.SCALARS: 1, event_accumulator.TENSORS: 1}
    found = event_accumulator.EventAccumulator(str(events), kept)
    found.Reload()
    out = {}
    for tag in found.Tags()["images"]:
        if tag.startswith(MATCH_MAPS):
            image = found.Images(tag)[-1]
            name = f"{tag.removeprefix(MATCH_MAPS)}, step {image.step}"
            out[name] = data_url(image.encoded_image_string, "png")
    return out
