"""The commit that a run's records name."""

import subprocess

from ds_cmli import provenance


def git(*arguments: str, cwd) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.com")
    return subprocess.check_output(["git", *identity, *arguments], cwd=cwd, text=True).strip()


def repository(folder):
    """A repository with one commit, and its name."""
    folder.mkdir()
    git("init", "-q", cwd=folder)
    git("commit", "-q", "--allow-empty", "-m", "first", cwd=folder)
    return git("rev-parse", "HEAD", cwd=folder)


def test_the_commit_is_that_of_the_repository_of_the_package(tmp_path, monkeypatch):
    commit = repository(tmp_path / "clone")
    package = tmp_path / "clone" / "ds_cmli"
    package.mkdir()
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    assert provenance.revision() == commit
    (package / "provenance.py").touch()
    git("add", ".", cwd=package)
    assert provenance.revision() == f"{commit}-dirty"


def test_a_package_in_an_environment_has_no_commit_though_it_lies_in_a_repository(tmp_path, monkeypatch):
    repository(tmp_path / "project")
    package = tmp_path / "project" / ".venv" / "lib" / "site-packages" / "ds_cmli"
    package.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    assert provenance.revision() is None
