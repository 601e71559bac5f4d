"""Ranks that have met and do not reach each other: what is said; the network device that gloo is given."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from ds_cmli.distributed import rendezvous
from tests.ranks import ROOT, environments, free_port, start_ranks
from tests.slurm.cluster import own_address

SCRIPT = str(ROOT / "tests" / "distributed" / "connecting_rank.py")
LIMIT = 2.0  # seconds
MET = "the 2 ranks met at 127.0.0.1:{}, but their first collective over gloo "


def two_ranks(folder: Path, away: str = "", **more: str) -> tuple[list[int], list[str], str]:
    """Exit codes and outputs of both ranks, where one that is away is killed in the end; and their port."""
    outputs = [folder / f"rank-{rank}" for rank in range(2)]
    port = str(free_port())
    ranks = start_ranks([SCRIPT, away, LIMIT], outputs, MASTER_PORT=port, **more)
    codes = [program.wait(50) for rank, program in enumerate(ranks) if str(rank) != away]
    for program in ranks:
        program.kill()
        program.wait()
    return codes, [output.read_text() for output in outputs], port


@pytest.mark.slow
def test_a_rank_that_does_not_come_ends_the_others_with_one_line(tmp_path):
    codes, (said, _), port = two_ranks(tmp_path, away="1")
    assert codes == [2]
    assert said == (
        f"error: {MET.format(port)}did not end within 2 s; GLOO_SOCKET_IFNAME is not set: set it to the network "
        "device by which the nodes reach each other\n"
    )
    codes, (_, said), _ = two_ranks(tmp_path, away="0")
    assert (codes, said) == ([2], "")  # rank 0 speaks for all


def test_a_network_device_that_is_not_there(tmp_path):
    codes, outputs, port = two_ranks(tmp_path, GLOO_SOCKET_IFNAME="none")
    assert codes == [2, 2]
    for rank, output in enumerate(outputs):
        assert output.startswith(f"rank {rank}: {MET.format(port)}failed; GLOO_SOCKET_IFNAME is 'none': set it to the")
        assert "none)\n" in output  # the reason


@pytest.mark.parametrize(
    "hostname, nodes, given, chosen",
    [
        ("localhost", ("a", "b"), {}, True),
        ("no.such.invalid", ("a", "b"), {}, True),
        ("localhost", ("a", "a"), {}, False),  # one machine
        ("192.0.2.77", ("a", "b"), {}, False),  # it resolves to an address that others reach
        ("localhost", ("a", "b"), {"MASTER_ADDR": "127.0.0.1"}, False),
        ("localhost", ("a", "b"), {"GLOO_SOCKET_IFNAME": "ib0"}, False),
    ],
)
def test_the_network_device_of_gloo(monkeypatch, hostname, nodes, given, chosen):
    own = own_address()
    if own == "127.0.0.1":
        pytest.skip("this machine has no network")
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": own, "SLURMD_NODENAME": nodes[0], **given}
    monkeypatch.setattr("os.environ", env)
    monkeypatch.setattr(socket, "gethostname", lambda: hostname)
    store = dist.HashStore()
    store.set("ds_cmli/node/1", f"{nodes[1]} 192.0.2.78")
    rendezvous.choose_device_of_gloo(store)
    name = env.get("GLOO_SOCKET_IFNAME")
    assert name == given.get("GLOO_SOCKET_IFNAME") or chosen
    if chosen:
        assert own in [address.address for address in psutil.net_if_addrs()[name]]


# Two nodes with a name, an address and a cable each; the names are those of a loopback address, as on Debian.
NODE = """
mount --bind {folder}/hosts-{name} /etc/hosts && hostname {name} && ip link set lo up && touch {folder}/up-{name}
until ip addr add 10.77.0.{number}/24 dev to-{name} 2>/dev/null; do sleep 0.05; done
ip link set to-{name} up; exec "$@"
"""
CABLE = "ip link add name to-n1 netns {0} type veth peer name to-n2 netns {1}"


def test_two_nodes_whose_names_are_of_a_loopback_address(tmp_path):
    if os.geteuid() or not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("networks are made by root, with unshare and ip")
    command = ["unshare", "--net", "--uts", "--mount", "bash", "-c"]
    nodes = []
    env = {**environments(2)[0], "MASTER_ADDR": "n1", "MASTER_PORT": str(free_port())}
    for number, name in enumerate(("n1", "n2"), 1):
        other = 3 - number
        hosts = f"127.0.0.1 localhost\n127.0.1.1 {name}\n10.77.0.{other} n{other}\n"
        (tmp_path / f"hosts-{name}").write_text(hosts)
        script = NODE.format(folder=tmp_path, name=name, number=number)
        nodes.append(
            subprocess.Popen([*command, script, "-", sys.executable, SCRIPT, "", "30"], stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env | {"RANK": str(number - 1)})
        )  # fmt: skip
    try:
        end = time.monotonic() + 20
        while len(list(tmp_path.glob("up-*"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        done = subprocess.run(CABLE.format(*(node.pid for node in nodes)).split(), capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no network can be made here: {done.stderr.strip()}")
        for rank, node in enumerate(nodes):
            assert node.communicate(timeout=60)[0] == f"rank {rank} on cpu: [True, False] by to-n{rank + 1}\n"
    finally:
        for node in nodes:
            node.kill()
