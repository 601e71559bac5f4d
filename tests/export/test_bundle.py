"""The exported code stands alone: no import of this package, every file within reach, nothing that is not used."""

import ast

from transformers.dynamic_module_utils import check_imports, get_relative_import_files

from ds_cmli.export.bundle import bundle

REPLACED = """
from typing import TYPE_CHECKING

from ds_cmli.models import weights
from ds_cmli.common.errors import UserError as Mistake

if TYPE_CHECKING:
    from ds_cmli.config.schema import Config

LIMIT = 3


def check(value: Mistake) -> None:
    from ds_cmli.cmli.contrastive import MAX_SCALE

    if value > LIMIT:
        raise Mistake(weights.BLOCK, MAX_SCALE)


def unused():
    import deepspeed
"""


def test_no_file_needs_the_package(exported):
    files = {path.name for path in exported.glob("*.py")}
    reached = {path.rsplit("/", 1)[-1] for path in get_relative_import_files(exported / "modeling_ds_cmli.py")}
    assert reached | {"modeling_ds_cmli.py"} == files
    for path in exported.glob("*.py"):
        check_imports(path)
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & {"ds_cmli", "deepspeed", "pydantic", "click"}, path


def test_only_what_is_used_is_copied(exported):
    tokens = (exported / "data_tokens.py").read_text()
    assert "class SpecialTokens" in tokens and "CaptionTokenizer" not in tokens


def test_imports_are_rewritten_wherever_they_stand():
    entry = "ds_cmli.export.folder"
    files = bundle({entry: "entry"}, {entry: REPLACED})
    text = files["entry.py"]
    assert "from .common_errors import UserError as Mistake" in text
    assert "    from .cmli_contrastive import MAX_SCALE\n" in text
    assert "from . import models_weights as weights\n" in text
    assert "TYPE_CHECKING" not in text
    assert set(files) == {
        "entry.py", "common_errors.py", "cmli_contrastive.py", "models_weights.py",
        "common_tensor_file.py",
    }  # fmt: skip
    assert "MAX_SCALE = 100.0" in files["cmli_contrastive.py"] and "def " not in files["cmli_contrastive.py"]
