import pytest


@pytest.fixture
def alone(monkeypatch):
    """The environment of a training of one process."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
