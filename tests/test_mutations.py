"""The mutations are of the package as it is; `mutations.py` runs them."""

import pytest

from tests.mutations import MUTATIONS, ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_is_of_one_place(mutation):
    assert (ROOT / "ds_cmli" / mutation.file).read_text().count(mutation.old) == 1
    assert all((ROOT / "tests" / path).exists() for path in mutation.tests)


def test_each_room_has_one():
    rooms = {path.name for path in (ROOT / "ds_cmli").iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert rooms <= {mutation.file.partition("/")[0] for mutation in MUTATIONS}
