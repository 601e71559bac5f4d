"""What a mistake's line adds where several settings decide: image sizes, and those of presets."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import PRESETS
from ds_cmli.config.registry import needs_teacher
from ds_cmli.config.schema import Config
from ds_cmli.models import timm_model
from ds_cmli.models.backbone import ImageRequest

MOST_PIXELS = 4096  # of data.image_size
# (section, the setting of a model, the setting of its sizes)
SIZES = (
    ("student", "image_model", "image_overrides"),
    ("student", "text_model", "text_overrides"),
    ("teacher", "model", "overrides"),
)


@contextmanager
def with_hints(config: Config) -> Iterator[None]:
    """Build the models inside. A proposed image size fits all; a preset's setting is called that.

    Raises:
        UserError: the one raised inside, with more in its line.
    """
    try:
        yield
    except timm_model.WrongImageSize as error:
        raise UserError(f"{error.problem}; {_size_for_all(config, error.patch)}") from None
    except UserError as error:
        line, hint = str(error), _of_the_preset(config, str(error))
        if hint:
            line = line.partition(": known: ")[0] + hint
        raise UserError(line) from None


def _size_for_all(config: Config, patch: tuple[int, int]) -> str:
    """The size nearest to the configured one that both image encoders take."""
    sides, size = {*patch}, config.data.image_size
    for request in _image_encoders(config):
        sides |= {*timm_model.patch(request)}
    step = math.lcm(*sides)
    if step > MOST_PIXELS:
        patches = " and ".join(map(str, sorted(sides)))
        return f"no size fits patches of {patches} pixels: choose other models"
    near = max(1, min(round(size / step), MOST_PIXELS // step)) * step
    if needs_teacher(config.loss.weights):
        return f"give for instance {near}, which fits student.image_model and teacher.model"
    return f"give for instance {near}"


def _image_encoders(config: Config) -> Iterator[ImageRequest]:
    student, teacher, size = config.student, config.teacher, config.data.image_size
    name, given = student.image_model, student.image_overrides
    yield ImageRequest("student.image_", name, "random", given, size, True, student.layers)
    if needs_teacher(config.loss.weights):
        yield ImageRequest(
            "teacher.", teacher.model, "random", teacher.overrides, size, True, block=teacher.block
        )


def _of_the_preset(config: Config, line: str) -> str:
    """A hint if the line is about sizes that the preset set for another model than this one."""
    for section, model, sizes in SIZES:
        preset = PRESETS.get(config.run.preset, {}).get(section, {})
        given, own = getattr(config, section), preset.get(model)
        of_the_preset = preset.get(sizes) and getattr(given, sizes) == preset[sizes]
        if of_the_preset and getattr(given, model) != own and f"{section}.{sizes}" in line:
            return (
                f"; the preset {config.run.preset!r} sets {section}.{sizes} for {own!r}: "
                f"give --set {section}.{sizes}={{}} too, or sizes of {getattr(given, model)!r}"
            )
    return ""
