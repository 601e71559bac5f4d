"""Plugins: which modules are imported, what they may change, and what a run's folder does not start."""

import json
import os

import pytest
from click.testing import CliRunner

from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.config.registry import LOSSES, LossEntry, load
from ds_cmli.config.schema import load_config
from ds_cmli.evaluate.__main__ import command as evaluate
from ds_cmli.memory.predict_subprocess import Predictor, Request
from tests.conftest import run

ENTRY = "LossEntry('tests.stranger.toy_losses:Filip', scores='cmli', kind='contrastive')"


@pytest.fixture
def written(tmp_path, monkeypatch, plugins):
    """A function that writes a module and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, body):
        (tmp_path / f"{name}.py").write_text(f"from ds_cmli.config.registry import LOSSES, LossEntry\n{body}\n")
        return name

    return write


def registers(name):
    return f"LOSSES[{name!r}] = {ENTRY}"


def test_a_plugin_adds_its_names_once(written, plugins):
    name = written("plugin_one", registers("one"))
    plugins.load(name)
    plugins.load(name)
    assert load_preset("tiny", {"loss": {"weights": {"one": 1.0}}}).registered >= {"one", "auto"}
    assert plugins.of_run(set()) == [name] and os.environ[plugins.VARIABLE] == name
    assert plugins.line() == "plugins: plugin_one (one)"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("1 / 0", r"^plugin is 'plugin_bad': its import fails, repair it: ZeroDivisionError: .*\.py, line 3\)$"),
        ("import nothing_of_this_name", "import fails, repair it: ModuleNotFoundError: No module named 'nothing_of_th"),
        ("raise SystemExit(0)", "its import fails, repair it: SystemExit: 0"), ("def", "its import fails.*SyntaxError"),
        (registers("cmli"), r"its LOSSES is 'cmli': the name is taken: give another$"),
        ("del LOSSES['cmli']", r"its LOSSES is 'cmli': the name is taken: give another$"),
        ("LOSSES['new'] = 'a:b'", r"its LOSSES\['new'\] is 'a:b': give a registry.LossEntry$"),
    ],
)  # fmt: skip
def test_one_that_fails_leaves_nothing(written, plugins, body, words):
    before = dict(LOSSES)
    name = written("plugin_bad", f"LOSSES['left'] = {ENTRY}\n{body}")
    for _ in range(2):  # a second try is no success
        with pytest.raises(UserError, match=words) as error:
            plugins.load(name)
        assert before == LOSSES and "\n" not in str(error.value)
    assert plugins.of_run({"left"}) == []


@pytest.mark.parametrize("name", ["nothing_of_this_name", "json.nothing", "./file.py", "", "a b", "a..b"])
def test_what_is_no_module_is_one_line(plugins, name):
    done = CliRunner().invoke(evaluate, ["--plugin", name, "--checkpoint", "RUN"])
    assert isinstance(done.exception, UserError) and str(done.exception).startswith(f"--plugin is {name!r}: ")
    assert ("no such module" if name.replace(".", "").isidentifier() and ".." not in name and "/" not in name
            else "give a module") in str(done.exception)  # fmt: skip


def test_an_implementation_that_is_missing_is_one_line(plugins):
    with pytest.raises(UserError, match=r"^'nowhere:Loss', an implementation of a plugin, cannot be .*'nowhere'$"):
        load(LossEntry("nowhere:Loss"))


def test_the_environment_and_entry_points_import(written, plugins, tmp_path, monkeypatch):
    monkeypatch.setenv(plugins.VARIABLE, f" {written('plugin_set', registers('one'))},")
    installed = tmp_path / "toy-0.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 0.1\n")
    name = written("plugin_installed", registers("two"))
    (installed / "entry_points.txt").write_text(f"[ds_cmli.plugins]\ntwo = {name}\n")
    load_preset("tiny", {"loss": {"weights": {"one": 1.0, "two": 1.0}}})
    assert plugins.of_run({"global"}) == ["plugin_set"]  # nothing of the other is used
    assert plugins.of_run({"two"}) == ["plugin_set", "plugin_installed"]
    (installed / "entry_points.txt").write_text("[ds_cmli.plugins]\nthree = plugin_three\n")
    plugins.load_installed.cache_clear()
    with pytest.raises(UserError, match=r"^the entry point 'three' of toy is 'plugin_three': no such module"):
        load_preset("tiny", {})


def test_a_folder_alone_imports_nothing(written, plugins, tmp_path):
    """Nor does the module run that lies where a command is started."""
    name = written("plugin_of_a_run", "open('ran', 'w')")
    content = {"config": load_preset("tiny", {}).to_dict(), "plugins": [name]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    line = (f"it was made with the plugin '{name}', which is code that a folder alone does not import: "
            f"give --plugin {name}, set DS_CMLI_PLUGINS, or import it first")  # fmt: skip
    for refused in (
        lambda: load_config(tmp_path / "config.json", "RUN"),
        lambda: plugins.require_those_of(str(tmp_path)),
    ):
        with pytest.raises(UserError, match=line):
            refused()
    assert not os.path.exists("ran")
    plugins.require_those_of(str(tmp_path / "none"))
    for damaged in ("x", [1], {"a": 1}):
        (tmp_path / "config.json").write_text(json.dumps({**content, "plugins": damaged}))
        with pytest.raises(UserError, match=r"its config.json is damaged, or of another version: plugins"):
            load_config(tmp_path / "config.json", "RUN")


def test_a_start_asks_for_the_plugin_of_the_run_that_it_resumes(written, plugins, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"plugins": ["plugin_gone"]}))
    given = ["--preset", "tiny", "--output-dir", str(tmp_path)]
    done = run(*given)
    assert done.returncode == 2 and "with the plugin 'plugin_gone'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_predicting_process_imports_them_too(plugins):
    plugins.load("tests.stranger.toy_plugin")
    config = load_preset("tiny", {"loss": {"weights": {"filip": 1.0}}})
    with Predictor(timeout_s=600) as predictor:
        result = predictor.ask(Request(config, {"zero_optimization": {"stage": 2}}, 1, "cpu"))
    assert result.report is not None, result.failed
