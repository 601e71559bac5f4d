import pytest

from ds_cmli.checkpoint import files
from tests.checkpoint.runs import DAMAGES, flip


@pytest.fixture
def folder(tmp_path):
    contents = {"a.pt": b"weights" * 1000, "b.json": b"{}", "empty": b""}
    entries = {n: files.write_file(tmp_path / n, lambda f, c=c: f.write(c)) for n, c in contents.items()}
    files.write_checksums(tmp_path, entries)
    assert entries["a.pt"]["bytes"] == 7000
    assert entries["empty"]["sha256"] == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["a.pt", "b.json", files.CHECKSUMS])
def test_every_damage_is_found_and_named(folder, name, damage):
    assert files.problem(folder) is None
    damage(folder / name)
    problem = files.problem(folder)
    assert problem is not None and name in problem


def test_any_byte_of_the_checksums_file_counts(folder):
    whole = (folder / files.CHECKSUMS).read_bytes()
    for byte in range(len(whole)):
        flip(folder / files.CHECKSUMS, byte)
        assert files.problem(folder) is not None, byte
        (folder / files.CHECKSUMS).write_bytes(whole)
    assert files.problem(folder) is None


def test_ranks_share_the_reading(folder):
    flip(folder / "a.pt")  # the first of three files
    assert [files.problem(folder, part, 2) is None for part in range(2)] == [False, True]


def test_publishing_replaces_at_once_or_not_at_all(tmp_path, monkeypatch):
    files.publish(tmp_path / "latest", b"old")
    files.publish(tmp_path / "latest", b"new")
    assert (tmp_path / "latest").read_bytes() == b"new"

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.publish(tmp_path / "latest", b"newer")
    assert (tmp_path / "latest").read_bytes() == b"new"
