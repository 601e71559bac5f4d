import subprocess

from ds_cmli.common import provenance


def test_revision_tells_changed_sources_and_not_output(tmp_path, monkeypatch):
    module = tmp_path / "ds_cmli" / "common" / "provenance.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(module))
    assert provenance.revision() is None
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    clean = provenance.revision()
    assert clean and len(clean) == 40
    (tmp_path / "slurm-12.out").write_text("output")
    assert provenance.revision() == clean
    (module.parent / "new.py").write_text("a source")
    assert provenance.revision() == clean + "+"
    (module.parent / "new.py").unlink()
    module.write_text("changed")
    assert provenance.revision() == clean + "+"
