"""Zero-shot classification of pictures in folders of classes.

A class's global embedding is the normalised mean over its prompts (Radford et al., 2021, section
3.1.4). Token embeddings of different prompts have no mean, so the CMLI scores of the prompts, from
the picture's side, are averaged (FILIP, arXiv 2111.07783, section 3.1).

K kinds of scores, I and B pictures of all ranks and of a batch, C classes, N patches, H hidden
size, D embedding dimension.
"""

import os
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import ImageFolder

from ds_cmli.cmli import cmli_scores
from ds_cmli.config.messages import check
from ds_cmli.config.schema import Config, DataConfig
from ds_cmli.data.images import View
from ds_cmli.data.pairs import Bad
from ds_cmli.distributed import process_group as distributed
from ds_cmli.errors import UserError, blame
from ds_cmli.evaluate.embed import Evaluator, PictureFiles, left_out, pad_texts, share_of_rank
from ds_cmli.evaluate.measures import TOP, mean_accuracies, top_hits
from ds_cmli.evaluate.summary import Metrics, prefixed
from ds_cmli.scores import all_kinds

# Seven of OpenAI's eighty for ImageNet, which OpenAI found to work about as well as all.
TEMPLATES = """itap of a {}.
a bad photo of the {}.
a origami {}.
a photo of the large {}.
a {} in a video game.
art of the {}.
a photo of the small {}."""


class ClassPictures(PictureFiles):
    """The pictures of a folder of class folders, each with the number of its class."""

    def __init__(
        self, folder: str, config: DataConfig, names_file: str | None, templates_file: str | None
    ) -> None:
        """Open the folder. Raises `UserError`.

        `names_file`: a name a line, None: the folders' names; `templates_file`: a prompt with {} a
        line, None: `TEMPLATES`.
        """
        with blame(f"--zero-shot {folder}: give a folder with folders of pictures"):
            images = ImageFolder(os.path.expanduser(folder), allow_empty=True)
        if not images.samples:
            raise UserError(f"--zero-shot {folder}: its folders of classes hold no picture")
        super().__init__(View.of(config), [(Path(file), label) for file, label in images.samples])
        self.names = [name.replace("_", " ") for name in images.classes]
        if names_file:
            self.names = _read_lines("--class-names", names_file)
        if len(self.names) != len(images.classes):
            counts = f"{len(self.names)} names, {len(images.classes)} folders"
            raise UserError(f"--class-names {names_file}: {counts}")
        self.templates = TEMPLATES.splitlines()
        if templates_file:
            self.templates = _read_lines("--templates", templates_file)
        for line in self.templates:
            if line.count("{}") != 1:
                need = f"{line!r} needs one {{}} for the name"
                raise UserError(f"--templates {templates_file}: {need}")


def _read_lines(option: str, file: str) -> list[str]:
    with blame(f"{option} is {file!r}, which cannot be read"):
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()] or [""]


def open_class_folders(config: Config) -> dict[str, ClassPictures]:
    """Open the folders of `run.zero_shot`, by their names. Raises `UserError`."""
    setting = config.run.zero_shot
    opened: dict[str, ClassPictures] = {}
    for folder in [setting] if isinstance(setting, str) and setting else setting:
        name = Path(folder).absolute().name
        check(name not in opened, "run.zero_shot", setting, f"two folders are {name!r}")
        opened[name] = ClassPictures(folder, config.data, None, None)
    return opened


@torch.no_grad()
def classify(evaluator: Evaluator, pictures: ClassPictures) -> Metrics:
    """Return `mean_accuracies` of each score over the pictures of all ranks. Collective."""
    was_training = evaluator.model.training
    evaluator.model.eval()
    prompts = [text.replace("{}", name) for name in pictures.names for text in pictures.templates]
    embedded, bad_prompts = evaluator.texts(dict(enumerate(prompts)), len(prompts))
    for number in bad_prompts:
        raise UserError(f"{prompts[number]!r} has no token: name the class by --class-names")
    texts = pad_texts([embedded[number] for number in range(len(prompts))])
    # On the device once, for all pictures.
    prompt_cls, tokens, token_mask = (tensor.to(evaluator.device) for tensor in texts)
    classes_and_templates = len(pictures.names), len(pictures.templates)
    mean_cls = prompt_cls.unflatten(0, classes_and_templates).mean(1)
    class_cls = F.normalize(mean_cls, dim=-1)  # [C, H]

    def score(cls: Tensor, patches: Tensor) -> Tensor:
        """fp32 [B, H], [B, N, D] -> fp32 [K, B, C]."""
        cmli = None
        if "cmli" in evaluator.kinds:
            prompt_scores, _ = cmli_scores(patches, tokens, token_mask)
            class_scores = prompt_scores.unflatten(1, classes_and_templates).mean(2)
            cmli = class_scores, class_scores
        kinds = all_kinds(cls @ class_cls.t(), cmli, evaluator.scales)
        return torch.stack([kinds[kind].i2t for kind in evaluator.kinds])

    hits = []
    targets = []
    bad: list[Bad] = []
    own_pictures = share_of_rank([*range(len(pictures.rows))])
    for numbers, cls, patches, reasons in evaluator.images(pictures, own_pictures):
        target = torch.tensor([pictures.rows[number][1] for number in numbers], dtype=torch.int64)
        hits.append(top_hits(score(cls, patches).cpu(), target))  # CPU-GPU sync
        targets.append(target)
        bad += [(pictures.name(number), reason) for number, reason in reasons.items()]
    evaluator.model.train(was_training)
    own_results = torch.cat(hits, 2), torch.cat(targets), bad
    gathered = distributed.gather_objects(own_results)  # collective
    hits_of_ranks, targets_of_ranks, bad_of_ranks = zip(*gathered, strict=True)
    all_hits = torch.cat(hits_of_ranks, 2)  # [2, K, I]
    target = torch.cat(targets_of_ranks)
    bad = [*chain(*bad_of_ranks)]
    metrics = {"pictures": len(target), "classes": len(pictures.names)}
    metrics |= left_out(len(bad), bad, len(target))
    for k, kind in enumerate(evaluator.kinds):
        metrics |= prefixed(f"{kind}/", mean_accuracies(all_hits[:, k], target))
    return metrics | {f"chance/top{k}": min(1.0, k / len(pictures.names)) for k in TOP}
