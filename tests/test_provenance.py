import subprocess

from ds_cmli import provenance


def test_the_commit_is_that_of_the_packages_own_repository_alone(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.com"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.check_call([*git, *arguments])
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    for package, expected in (("ds_cmli", commit), (".venv/site-packages/ds_cmli", None)):
        (tmp_path / package).mkdir(parents=True)
        monkeypatch.setattr(provenance, "__file__", str(tmp_path / package / "provenance.py"))
        assert provenance.revision() == expected
