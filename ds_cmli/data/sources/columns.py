"""Finding the columns of the image and of the caption in a table."""

from ds_cmli.common.errors import UserError, nearest
from ds_cmli.config.schema import DataConfig

IMAGE_KEYS = (
    "filepath",
    "file_name",
    "filename",
    "image",
    "image_path",
    "img",
    "path",
    "jpg",
    "png",
    "image_bytes",
    "bytes",
)
CAPTION_KEYS = ("title", "caption", "captions", "text", "sentences")


def find_columns(
    where: str, images: list[str], captions: list[str], config: DataConfig
) -> tuple[str, str]:
    """The columns of the image and of the caption: those that are configured, or else the only ones with a usual name.

    A column without a usual name is taken if it is the only candidate.

    Args:
        images, captions: the columns that can hold images, and those that can hold captions.

    Raises:
        UserError: a column is not there, or there are none or several candidates.
    """
    wanted = (
        ("data.image_key (--csv-img-key)", config.image_key, IMAGE_KEYS, images),
        ("data.caption_key (--csv-caption-key)", config.caption_key, CAPTION_KEYS, captions),
    )
    found = []
    for setting, given, usual, columns in wanted:
        if given:
            if given not in columns:
                raise UserError(
                    f"{setting} is {given!r}, and {where} has no such column: {nearest(given, columns)}"
                )
            found.append(given)
            continue
        some = [column for column in columns if column.lower() in usual]
        some = some or (columns if len(columns) == 1 else [])
        if len(some) != 1:
            what = (
                f"has {' and '.join(some)}"
                if some
                else f"has the columns {', '.join(columns) or 'none'}"
            )
            raise UserError(f"{where} {what}: say which one is meant by {setting}")
        found.append(some[0])
    return found[0], found[1]
