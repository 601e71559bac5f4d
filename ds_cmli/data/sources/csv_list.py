"""A CSV or TSV file with a column of image paths and a column of captions, as for open_clip's `--train-data`."""

from itertools import chain, islice
from pathlib import Path

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.sources.base import Parts
from ds_cmli.data.sources.columns import find_columns
from ds_cmli.data.sources.images_of import LOOKED_AT, image_folder
from ds_cmli.data.sources.listed import Listed
from ds_cmli.data.sources.table import Table


def load_csv(name: str, files: list[Path], config: DataConfig) -> Parts:
    """Open the rows of all files; several rows with one path are captions of one image.

    Paths are absolute, or relative to `data.image_root`, the file's folder or its parent folder.

    Raises:
        UserError: a column is missing or ambiguous, the images are not found, or as `Table.rows`.
    """
    source: Listed | None = None
    notices: list[str] = []
    for file in files:
        try:
            with open(file, encoding="utf-8-sig", newline="") as lines:
                header = lines.readline()
                lines.seek(0)
                separator = config.separator.replace("\\t", "\t") or (
                    "\t" if "\t" in header else ","
                )
                table = Table(lines, file, separator)
                keys = find_columns(str(file), table.columns, table.columns, config)
                image, caption = (table.columns.index(key) for key in keys)
                rows = table.rows(image)
                first = list(islice(rows, LOOKED_AT))
                if source is None and first:
                    source = _source(name, file, [cells[image] for _, cells in first], config)
                for line, cells in chain(first, rows):
                    if not cells[image] or "\0" in cells[image]:
                        raise UserError(
                            f"{file} line {line} has the image {cells[image]!r}: give its path"
                        )
                    assert source is not None
                    source.add(cells[image], cells[caption])
                notices += table.notices()
        except UnicodeError as error:
            raise UserError(f"{file} cannot be read ({error}): save it as UTF-8 text") from None
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror or error})") from None
    if source is None or not len(source):
        raise UserError(
            f"data.source is {name!r}, which has no row with a caption: give at least 2"
        )
    return Parts(source, notices=notices)


def _source(name: str, file: Path, paths: list[str], config: DataConfig) -> Listed:
    """An empty list of the images that `file` names; `paths` are the first of them."""
    folder = image_folder(file, paths, config)
    # The list is the user's own, so a list of absolute paths may name files anywhere.
    return Listed(name, folder, Path("/") if Path(paths[0]).is_absolute() else folder, config)
