from ds_cmli.files import check_writable
from tests.make import refused


def test_a_file_is_tried_and_left_as_it_was(tmp_path):
    new = tmp_path / "new.json"
    old = tmp_path / "old.json"
    old.write_text("kept")
    for path in (new, old):
        check_writable(str(path))
    assert not new.exists() and old.read_text() == "kept"
    for path in (tmp_path / "none" / "x.json", old / "x.json", tmp_path):
        assert refused(check_writable, str(path)).startswith(f"cannot write '{path}': ")
