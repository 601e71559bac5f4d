import random

import pytest

from ds_cmli.common.cache import cache_folder, is_sealed, seal
from ds_cmli.common.errors import UserError


def test_a_user_without_a_home_folder(monkeypatch):
    monkeypatch.setenv("DS_CMLI_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(UserError, match="no home folder for ~nobody-of-this-name/cache: set DS_CMLI_CACHE"):
        cache_folder()


def test_damage_of_a_sealed_file_is_found(tmp_path):
    path = tmp_path / "x"
    chance = random.Random(0)
    for size in (0, 1, 100, 2**20 + 1):
        content = chance.randbytes(size)
        path.write_bytes(content)
        assert not is_sealed(path)
        seal(path)
        whole = path.read_bytes()
        assert whole.startswith(content) and is_sealed(path)
        for _ in range(40):
            damaged = bytearray(whole)
            damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            assert not is_sealed(path)
            path.write_bytes(whole[: chance.randrange(len(whole))])
            assert not is_sealed(path)
    assert not is_sealed(tmp_path / "none") and not is_sealed(tmp_path)
