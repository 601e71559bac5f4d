"""Tars in a storage: the same samples as from a disk, on any ranks and workers, whatever fails on the way."""

import json
import random
from functools import partial

import psutil
import pytest

from ds_cmli.data import network, shard_cache
from ds_cmli.data.sources.remote import list_once
from ds_cmli.errors import UserError
from profiling.speed import storage_server
from tests import make
from tests.data.batches import global_batches, run

ROWS = [8, 9, 10, 11, 12, 13]
DAMAGE = {
    "no such file": lambda tar: tar.unlink(),
    "no whole, uncompressed tar": lambda tar: tar.write_bytes(tar.read_bytes()[:5000]),
    "the shard has 6 samples and not 11": lambda tar: make.tar(tar, 6, first=300),
}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Shards with their numbers of samples beside them; a reader fetches them itself, at once."""
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ds_cmli.data.sources.remote.start_fetching", lambda cache: None)
    monkeypatch.setattr(shard_cache, "ALONE_SECONDS", 0)
    monkeypatch.setattr(network, "FIRST_PAUSE", 0.001)
    for number, count in enumerate(ROWS):
        make.tar(tmp_path / f"{number}.tar", count, first=100 * number)
        (tmp_path / f"{number}_stats.json").write_text(json.dumps({"count": 99, "successes": count}))
    with storage_server.http(tmp_path) as server:
        yield server


def opened(server, name="{url}/{0..5}.tar", **settings):
    source = name.replace("{url}", server.url)
    settings = {"held_out": 3, "max_bad_share": 1, "tokenizer": "builtin", "shuffle_window": 2, **settings}
    return make.data(source, seed=5, **settings)


def test_samples_are_those_of_local_tars_on_any_ranks_and_workers_through_failures(server):
    server.failures = 0.3
    remote = opened(server)
    assert "order: the samples of 2 of 6 shards at a time" in remote.summary[-1]
    stop = random.Random(1).randint(1, 13)
    first, state = run(remote, 2, 1, None, stop)
    second, _ = run(opened(server), 4, 0, state, 14 - stop)
    assert global_batches(first + second) == global_batches(run(remote, 1, 0, None, 14)[0])
    tars = f"{server.folder}/*.tar"
    sources = [("{url}/{0..5}.tar", False), (tars, False), (tars, True)]
    runs = [opened(server, name, val_source=tars, cache=cache) for name, cache in sources]
    assert run(runs[0], 1, 0, None, 14) == run(runs[1], 1, 0, None, 14) == run(runs[2], 1, 0, None, 14)
    assert runs[1].fingerprint == runs[2].fingerprint and server.num_failed > 0


def test_no_connection_is_left_open_that_loader_processes_would_share(server):
    assert len(list_once("shards of \udcff", [f"{server.url}/{number}.tar" for number in range(6)])) == 6
    peers = [connection.raddr for connection in psutil.Process().net_connections("tcp") if connection.raddr]
    assert server.server_port not in [port for _, port in peers]


def test_a_copy_whose_index_somebody_has_deleted_is_fetched_again(server, tmp_path, monkeypatch):
    tries = 5 * [shard_cache.ShardCache.get]  # more would be a loop without an end
    monkeypatch.setattr(shard_cache.ShardCache, "get", lambda *arguments: tries.pop()(*arguments))
    before = opened(server, "{url}/0.tar").train[0]
    (rows,) = (tmp_path / "cache/shards").glob("*.rows")
    rows.unlink()
    after = opened(server, "{url}/0.tar").train[0]
    assert not after.bad and (after.image == before.image).all() and rows.exists()
    assert server.fetched["0.tar"] == 2


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_lost_shard_counts_as_bad_samples_and_resumes_exactly(server, reason):
    DAMAGE[reason](server.folder / "3.tar")
    data = opened(server)
    first, state = run(data, 2, 0, None, 4)
    second, _ = run(opened(server), 1, 0, state, 6)
    assert global_batches(first + second) == global_batches(run(data, 1, 0, None, 10)[0])
    bad = [sample.bad for sample in map(data.train.__getitem__, range(len(data.train))) if sample.bad]
    assert 4 <= len(bad) <= 11
    assert all(f"{server.url}/3.tar, sample " in name and reason in why for name, why in bad)


def test_a_storage_that_is_gone_for_good_ends_the_run_and_is_no_bad_sample(server, monkeypatch):
    monkeypatch.setattr(shard_cache, "RETRY_SECONDS", 0.1)
    data = opened(server)
    server.is_gone = True
    with pytest.raises(UserError, match=r"/\d\.tar cannot be fetched \(\d tries\)"):
        run(data, 1, 0, None, 14)


def test_what_cannot_be_opened_and_a_cache_too_small_are_one_line(server):
    (server.folder / "5_stats.json").unlink()
    small = {"cache_gb": 1e-5, "val_source": f"{server.folder}/0.tar"}
    for name, settings, message in (
        ("s9://bucket/{0..5}.tar", {}, "s9"),
        ("{url}/x{0..5}.tar", {}, "none of the 6 shards exists"),
        ("{url}/{0..5}.tar", {}, "no number of samples is given by"),
        ("{url}/{0..4}.tar", small, "a node reads 3 shards at a time"),
    ):
        with pytest.raises(UserError, match=message):
            opened(server, name, **settings)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A storage of S3's protocol with six tars of 20 samples."""
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # of an earlier server's port
    storage = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    storage.start()
    _, port = storage.get_host_and_port()
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL")
    for name, value in zip(names, ("key", "secret", "us-east-1", f"http://127.0.0.1:{port}"), strict=True):
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for number in range(6):
        client.upload_file(make.tar(tmp_path / "tar", 20, first=100 * number), "bucket", f"pairs/{number}.tar")
    sizes = json.dumps({f"{number}.tar": 20 for number in range(6)})
    client.put_object(Bucket="bucket", Key="pairs/sizes.json", Body=sizes)
    yield "s3://bucket/pairs/{0..5}.tar"
    storage.stop()


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("bucket_weight, list_weight", [("", ""), ("::0.7", "::0.3")])
def test_a_bucket_and_a_list_resume_on_any_ranks_workers_and_micro_batches(
    server, bucket, window, bucket_weight, list_weight
):
    sources = [bucket + bucket_weight, make.pairs(server.folder / "list", 60) + list_weight]
    augmentation = {"random_resized_crop": 0.5, "color_jitter": 0.4}
    settings = {"shuffle_window": window, "held_out": 10, "augmentation": augmentation, "tokenizer": "builtin"}
    data = partial(make.data, sources, seed=5, **settings)
    chance = random.Random(f"{window} {bucket_weight}")
    whole, _ = run(data(), 1, 0, None, 24, 30)
    seen = []
    state = None
    while len(seen) < len(whole):
        ranks = chance.choice([1, 2, 3, 5])
        steps = min(chance.randint(1, 6), (len(whole) - len(seen)) // 30)
        more, state = run(data(), ranks, chance.choice([0, 1, 3]), state, steps, 30)
        seen += more
    assert global_batches(seen, 30) == global_batches(whole, 30)
    first, state = run(data(), 2, 1, None, 2, 30)
    second, _ = run(data(), 5, 3, state, 9, 10)  # to the end of the epoch
    assert sorted(first + second) == sorted(whole[:150])
