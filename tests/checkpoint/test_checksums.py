import pytest

from ds_cmli.checkpoint import checksums


@pytest.fixture
def folder(tmp_path):
    contents = {"a.pt": b"weights" * 1000, "b.json": b"{}", "empty": b""}
    files = {n: checksums.write_file(tmp_path / n, lambda f, c=c: f.write(c)) for n, c in contents.items()}
    checksums.write(tmp_path, files)
    assert files["a.pt"]["bytes"] == 7000
    assert files["empty"]["sha256"] == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    return tmp_path


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path, byte=0):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path):
    path.unlink()


DAMAGES = (truncate, flip, lengthen, remove)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["a.pt", "b.json", checksums.NAME])
def test_every_damage_is_found_and_named(folder, name, damage):
    assert checksums.problem(folder) is None
    damage(folder / name)
    problem = checksums.problem(folder)
    assert problem is not None and name in problem


def test_any_byte_of_the_checksums_file_counts(folder):
    whole = (folder / checksums.NAME).read_bytes()
    for byte in range(len(whole)):
        flip(folder / checksums.NAME, byte)
        assert checksums.problem(folder) is not None, byte
        (folder / checksums.NAME).write_bytes(whole)
    assert checksums.problem(folder) is None


def test_ranks_share_the_reading(folder):
    flip(folder / "a.pt")  # the first of three files
    assert [checksums.problem(folder, part, 2) is None for part in range(2)] == [False, True]


def test_publishing_replaces_at_once_or_not_at_all(tmp_path, monkeypatch):
    checksums.publish(tmp_path / "latest", b"old")
    checksums.publish(tmp_path / "latest", b"new")
    assert (tmp_path / "latest").read_bytes() == b"new"

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        checksums.publish(tmp_path / "latest", b"newer")
    assert (tmp_path / "latest").read_bytes() == b"new"
