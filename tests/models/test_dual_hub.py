"""Models by their names on a hub, which is a server on this machine: fetched once, then used without it."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT, clean_environment
from tests.data.sources.servers import serving
from tests.make import pairs
from tests.models.dual_models import clip, siglip

pytestmark = pytest.mark.slow


def python(environment, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("kind, losses", [("clip", "global,cmli"), ("siglip", "global_sigmoid,cmli")])
def test_a_model_by_its_name(kind, losses, tmp_path):
    folder, data = (clip if kind == "clip" else siglip)(tmp_path / kind), pairs(tmp_path / "pairs", count=24)
    own = clean_environment() | {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    name, run = f"red/{kind}", tmp_path / "run"
    evaluation = ("-m", "ds_cmli.evaluate", name, "--data", data)
    training = ("-m", "ds_cmli.train", "--preset", "tiny", "--start-from", name, "--losses", losses, "--data", data)
    training += ("--steps", "2", "--output-dir", str(run), "--set", "run.match_maps=0")
    with serving() as server:
        own["HF_ENDPOINT"] = server.url
        server.models[name] = {file.name: file.read_bytes() for file in folder.iterdir()}
        by_name, by_folder = python(own, *evaluation), python(own, *evaluation[:2], str(folder), *evaluation[3:])
        assert by_name.returncode == 0, by_name.stderr
        assert by_name.stdout == by_folder.stdout
        fetched = [path for path, _ in server.fetched()]
        assert sorted(path for path in fetched if path.endswith("safetensors")) == ["model.safetensors"]
        none = python(own, *evaluation[:2], "red/none", *evaluation[3:])
        assert none.returncode == 2 and "no folder, and no model of the hub" in none.stderr
    done = python(own, *training)
    assert done.returncode == 0, done.stdout + done.stderr
    done = python(own, "-m", "ds_cmli.export", str(run), str(tmp_path / "x"), "--as", kind, "--interpolate", "0.5")
    assert done.returncode == 0, done.stderr
    done = python(own | {"HF_HOME": str(tmp_path / "other")}, *evaluation)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"where it can, `hf download {name} --local-dir FOLDER`; then give FOLDER" in done.stderr
