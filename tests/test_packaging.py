"""A wheel is enough to train with: what the package reads beside its code is in it, and found there."""

import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tests.ranks import ROOT, clean_environment, python


def test_the_wheel_holds_every_file_that_is_no_code_and_finds_it_there(tmp_path):
    source = tmp_path / "source"
    installed = tmp_path / "site-packages"
    for name in ("ds_cmli", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(installed)
    beside = [p.relative_to(ROOT) for p in (ROOT / "ds_cmli").rglob("*") if p.suffix in (".json", ".txt", ".cpp")]
    beside += [p.relative_to(ROOT) for p in (ROOT / "ds_cmli" / "config" / "ds_configs").iterdir()]
    assert len(beside) >= 7
    for path in beside:
        assert (installed / path).read_bytes() == (ROOT / path).read_bytes()
    script = "from ds_cmli.config.options import DEFAULT_JSON as path; print(path)"
    env = clean_environment() | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str(installed / "ds_cmli" / "config" / "ds_configs" / "zero2.json"), done.stderr


def test_every_command_of_the_page_is_a_function_and_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "install.md").read_text()
    assert set(project["scripts"]) == set(re.findall(r"`(ds-cmli-\w+)`", page))
    for place in project["scripts"].values():
        assert not inspect.signature(pkgutil.resolve_name(place)).parameters
    assert f"\nversion: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert python("ds_cmli/train.py", "--version").stdout == f"ds-cmli, version {project['version']}\n"
