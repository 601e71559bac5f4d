"""Pictures, tables, tars, JSON, runs, batches and engines of tests. Each is small and made by a seed."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import Config
from ds_cmli.data.pairs import Batch
from ds_cmli.data.tokens import tokenizer_of
from ds_cmli.errors import UserError
from tests import ranks

# One layer everywhere, and a data set of its own for each test: the smallest training there is.
SMALL = {"student": {"layers": 1, "shared_blocks": 1}, "teacher": {"block": 0}}
# Sizes of two small layers, as the libraries name them.
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
T5 = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64, "d_kv": 16}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2}
FEATURE_MAPS = {
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [16, 16, 16, 32]},
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [16, 16, 16, 32]},
}


def refused(call: Callable, *arguments: object, **options: object) -> str:
    """Return the one line of the `UserError` that a call raises."""
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    line = str(error.value)
    assert "\n" not in line, line[:1000]
    return line


def picture(number: int, side: int = 40) -> Image.Image:
    """Return a picture unlike those of other numbers: stripes in two colours."""
    image = Image.new("RGB", (side, side), (number * 53 % 256, number * 101 % 256, number * 197 % 256))
    image.paste((255 - number * 31 % 256, number * 71 % 256, 90), (0, number * 7 % side, side, side))
    return image


def pictures(folder: Path, *names: str, side: int = 40) -> Path:
    """Write pictures in files of these names, and return the folder."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number, side).save(folder / name)
    return folder


def pairs(
    folder: Path, count: int = 24, broken: Sequence[int] = (), empty: Sequence[int] = (), column: str = "text"
) -> str:
    """Write pictures with a table of captions, those of some numbers damaged, and return the folder."""
    captioned(folder, [["" if number in empty else f"a red square {number}"] for number in range(count)], column)
    for number in broken:
        (folder / f"{number}.png").write_bytes(b"not a picture")
    return str(folder)


def captioned(folder: Path, captions: Sequence[Sequence[str]], column: str = "text") -> str:
    """Write pictures 0.png, 1.png, ... and a table of their captions, and return the folder."""
    pictures(folder, *(f"{number}.png" for number in range(len(captions))))
    rows = [{"file_name": f"{number}.png", column: text} for number, texts in enumerate(captions) for text in texts]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def shard(path: Path, members: Iterable[tuple], form: int = tarfile.PAX_FORMAT) -> Path:
    """Write a tar of members: name and content, or name, target and type of a link."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, content, *link in members:
            member = tarfile.TarInfo(name)
            if link:
                (member.type,) = link
                member.linkname = content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def png(number: int) -> bytes:
    picture(number).save(content := io.BytesIO(), "png")
    return content.getvalue()


def tar(path: Path, count: int = 24, first: int = 0) -> str:
    """Write a WebDataset tar: `N.png` and `N.txt`."""
    numbers = range(first, first + count)
    pictures = [(f"{number:04}.png", png(number)) for number in numbers]
    texts = [(f"{number:04}.txt", f"a blue circle {number}".encode()) for number in numbers]
    return str(shard(path, sorted(pictures + texts)))


def parquet(folder: Path, count: int = 24) -> str:
    """Write a parquet file of pictures and captions, and return its folder."""
    import datasets

    images = [{"bytes": png(number), "path": f"{number}.png"} for number in range(count)]
    rows = {"image": images, "caption": [f"a green line {number}" for number in range(count)]}
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    return str(folder)


def json_file(path: Path, content: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return the content of each file below a folder, and None for each folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def karpathy(path: Path, images: Iterable[tuple[str, str, Sequence[str]]]) -> str:
    """Write Karpathy's list of images: file, split, captions."""
    content = []
    for file, split, texts in images:
        place, name = os.path.split(file)
        sentences = [{"raw": text} for text in texts]
        content.append({"filepath": place, "filename": name, "split": split, "sentences": sentences})
    return json_file(path, {"images": content})


def config(**sections: dict) -> Config:
    """Return the preset `tiny` of one layer, with other settings."""
    return load_preset("tiny", {name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in SMALL | sections})


def models(**sections: dict) -> tuple[nn.Module, nn.Module | None]:
    """Return the objective, with its student and losses, and the teacher if a loss needs it."""
    from ds_cmli.engine import build_models

    chosen = config(**sections)
    return build_models(chosen, tokenizer_of(chosen.data).vocab_size)


def data_of(chosen: Config):
    from ds_cmli.data.build import build_data

    return build_data(chosen.data, chosen.run.seed)


def data(source: str | Path | list[str], seed: int = 0, **settings):
    """Return the data of a source with the settings of the preset `tiny`, and others."""
    source = str(source) if isinstance(source, Path) else source
    return data_of(load_preset("tiny", {"data": {"source": source, **settings}, "run": {"seed": seed}}))


def batches(data, size: int, number: int, rank: int = 0, world: int = 1) -> list[Batch]:
    """Return a rank's micro-batches: the samples rank, rank + world, ... of the training set in their order."""
    samples = range(rank, len(data.train), world)
    parts = [samples[start : start + size] for start in range(0, size * number, size)]
    return [data.collate([data.train[sample] for sample in part]) for part in parts]


def train_engine(device: torch.device, ds_config: dict, steps: int = 6, world: int = 1, **sections: dict):
    """Return the engine that the trainer would build, in `device`'s process group."""
    from ds_cmli import engine
    from ds_cmli.config.deepspeed_config import DeepSpeedConfig

    chosen = config(**sections)
    resolved = engine.adapt_to_device(DeepSpeedConfig.of(ds_config)).filled(chosen, world, steps)
    return engine.build(chosen, resolved, tokenizer_of(chosen.data).vocab_size, steps, device)


def step(trained, micro_batches: list[Batch]) -> dict[str, float]:
    """Train one optimizer step, and return the means of the losses over its micro-batches, by name."""
    losses = trained.step(micro_batches)
    means = {name: torch.stack([loss.losses[name] for loss in losses]).mean().item() for name in losses[0].losses}
    return {"total": torch.stack([loss.total for loss in losses]).mean().item(), **means}


def gradients(trained, micro_batches: list[Batch]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Train one step, and return its losses and the whole gradients that the optimizer gets, by parameter."""
    from deepspeed.utils import safe_get_full_grad

    engine = trained.engine
    update = engine.step
    gradient_by_name: dict[str, Tensor] = {}

    def keep_gradients_and_update(*arguments, **keywords):
        if engine.is_gradient_accumulation_boundary():
            for name, parameter in trained.objective.named_parameters():
                gradient_by_name[name] = safe_get_full_grad(parameter).clone()
        return update(*arguments, **keywords)

    with mock.patch.object(engine, "step", keep_gradients_and_update):
        return step(trained, micro_batches), gradient_by_name


def relative_differences(gradient_by_name: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the norm of the difference of each two gradients, relative to the expected one.

    Some gradients are zero but for rounding: a key's bias shifts all of its softmax alike. A gradient below 1e-6 of the
    whole one is compared relative to that.
    """
    assert gradient_by_name.keys() == expected.keys()
    smallest = 1e-6 * torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    return {n: ((gradient_by_name[n] - g).norm() / max(g.norm(), smallest)).item() for n, g in expected.items()}


def train(*arguments: str, world: int = 1, stop_at: int | None = None) -> int:
    """Return the exit code of a training in this process as the only rank, or on ranks of their own; see `drive`."""
    from tests.drive_train import drive, drive_rank

    if world > 1:
        (code,) = set(ranks.run(drive_rank, world, [*arguments], stop_at, group=False, timeout=600))
        return code
    with mock.patch.dict(os.environ, ranks.ALONE):
        return drive([*arguments], stop_at)


def small(options: dict[str, object], settings: dict[str, object] | None = None) -> list[str]:
    """Return the arguments of the smallest training, with other options and settings; None leaves one to the preset."""
    chosen: dict[str, object] = {"run.match_maps": 0, "data.workers": 0}
    for section, values in SMALL.items():
        chosen |= {f"{section}.{name}": value for name, value in values.items()}
    words = ["--preset", "tiny"]
    for name, value in (chosen | (settings or {})).items():
        if value is not None:
            words += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    for name, value in options.items():
        words += [name, str(value)]
    return words


def lines(folder: Path, key: str = "loss") -> list[dict]:
    """Return the lines of a run's metrics that have `key`."""
    logged = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in logged if key in line]


def metrics(folder: Path) -> list[dict]:
    """Return every line, without the columns that differ from run to run."""
    measured = {"pairs_per_s", "time/data", "peak_memory_bytes", "tflops", "mfu"}
    return [{name: x for name, x in line.items() if name not in measured} for line in lines(folder, "step")]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def untrained(losses: Sequence[str] = ("global", "cmli"), **sections: dict):
    """Return a run's configuration in the sizes of `tiny`, its objective with random weights, and its tokenizer."""
    from ds_cmli.engine import build_models

    chosen = load_preset("tiny", {"loss": {"weights": dict.fromkeys(losses, 1.0)}, **sections})
    torch.manual_seed(0)
    words = tokenizer_of(chosen.data)
    return chosen, build_models(chosen, words.vocab_size, pad_id=words.pad_id)[0], words


def write_run(folder: Path, losses: Sequence[str] = ("global", "cmli"), **sections: dict) -> Path:
    """Write a run of `untrained` as training leaves it."""
    return save_run(folder, *untrained(losses, **sections))


def save_run(folder: Path, chosen: Config, objective, words) -> Path:
    from ds_cmli.checkpoint.weights import write_weights
    from ds_cmli.models.hf import WEIGHTS, write_config

    folder.mkdir(parents=True, exist_ok=True)
    kept = {name for name in objective.state_dict() if not name.startswith("width_head.")}
    # A table that two modules share is here once.
    named = [*objective.named_parameters(), *objective.named_buffers()]
    tensors = {name: value.detach().clone() for name, value in named if name in kept}
    write_weights(tensors, folder / WEIGHTS)
    write_config(folder, chosen, objective.student, words)
    (folder / "run.json").write_text(json.dumps({"config": chosen.to_dict()}))
    return folder
