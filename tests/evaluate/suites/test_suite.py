"""What a suite's file may hold, and the line for each mistake."""

import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from pydantic.dataclasses import dataclass

from ds_cmli.common.errors import UserError
from ds_cmli.config.registry import TASKS, load
from ds_cmli.config.schema import STRICT
from ds_cmli.evaluate.suites.suite import read_suite
from tests.conftest import ROOT
from tests.evaluate.suites import lists

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(config=STRICT, frozen=True)
class Mine:
    list: Path

    def read(self) -> None:
        """Nothing."""


def test_tasks_and_paths_from_the_suites_folder(tmp_path, monkeypatch):
    file = lists.write_suite(tmp_path, crepe=lists.sugarcrepe(tmp_path))
    monkeypatch.chdir("/")
    tasks = read_suite(file)
    assert list(tasks) == ["crepe"]
    assert tasks["crepe"].images == tmp_path / "val2017"
    assert [q.group for q in tasks["crepe"].questions].count("swap_obj") == 6


def test_tasks_of_the_page_are_tasks():
    """Each has its kind's settings, and each kind is there."""
    page = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    tables = tomllib.loads("".join(re.findall(r"(?ms)^```toml\n(.*?)^```", page)))
    assert {table["kind"] for table in tables.values()} == TASKS.keys()
    for table in tables.values():
        settings = fields(load(TASKS[table.pop("kind")]))
        required = {f.name for f in settings if f.default is MISSING and f.default_factory is MISSING}
        assert required <= table.keys() <= {f.name for f in settings}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "which has no task: add a table [NAME] with its kind"),
        ("\ufeff[a", "which is no TOML: Expected"),
        ("a = 3", "--suite: a is 3: give a table [a] with its kind, one of"),
        ("[a]\nfiles = 'x'", "give a table [a] with its kind, one of"),
        ("[a]\nkind = 'sugarcrep'", "--suite: a.kind is 'sugarcrep': did you mean 'sugarcrepe'?"),
        ("[a]\nkind = ['sugarcrepe']", "--suite: a.kind is ['sugarcrepe']: "),
        ("[a]\nkind = 'sugarcrepe'\nfile = '.'", "setting of --suite: a is 'file': did you mean 'files'?"),
        ("[a]\nkind = 'sugarcrepe'\nfiles = '.'", "--suite: a.images is missing: give it"),
        ("[a]\nkind = 'sugarcrepe'\nfiles = 'x'", "--suite: a.files is 'x': no such file or folder, from '"),
        ("[a]\nkind = 'sugarcrepe'\nfiles = ''", "--suite: a.files is '': no such file or folder"),
        ("[a]\nkind = 'sugarcrepe'\nfiles = 3\nimages = '.'", "--suite: a.files is 3: give a path as a text"),
        ("[a]\nkind = 'sugarcrepe'\nfiles = '.'\nimages = '.'", "has no .json file: name the folder that has them"),
    ],
)
def test_mistakes_are_one_line(tmp_path, text, words):
    (tmp_path / "s.toml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_suite(str(tmp_path / "s.toml"))
    assert words in str(error.value)


def test_a_suite_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(UserError, match="cannot read it: No such file"):
        read_suite(str(tmp_path / "none.toml"))
    (tmp_path / "s.toml").write_bytes(b"\xff\xfe[a]")
    with pytest.raises(UserError, match="which is no TOML: 'utf-8' codec"):
        read_suite(str(tmp_path / "s.toml"))
