"""A real Slurm on this machine, as root: a controller and three nodes, daemons in the foreground as child processes."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from tests.ranks import free_port

NODES = ("n1", "n2", "n3")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client"

# Tokens signed with a shared key in place of munge, no cgroups, no accounting. Grace and kill times are short; the
# rest is what a cluster with a preemptible partition ("main") under another one ("high") sets.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/slurm
CredType=auth/slurm
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=30
KillWait=20
MinJobAge=3600
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptParameters=send_user_signal
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeAddr={address} NodeHostname={host} Port={port} CPUs=64 RealMemory=64000 Gres=gpu:2"


class NoSlurm(Exception):
    """Slurm cannot be started here; the message says why."""


class Cluster:
    def __init__(self, folder: Path):
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen] = {}
        self.nodes: dict[str, subprocess.Popen] = {}  # the last slurmd of each

    def start(self) -> None:
        """Write the configuration, start the daemons and wait until all nodes are idle."""
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing:
            raise NoSlurm(f"{missing[0]} is not installed: {INSTALL}")
        if os.geteuid() != 0:
            raise NoSlurm("its daemons must be started by root")
        host = subprocess.run(["hostname", "-s"], capture_output=True, text=True, check=True).stdout.strip()
        self.address = own_address()
        names = [NODE.format(name=name, address=self.address, host=host, port=free_port()) for name in NODES]
        values = {"host": host, "folder": self.folder, "controller_port": free_port(), "nodes": "\n".join(names)}
        self.conf.write_text(SLURM_CONF.format(**values))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        (self.folder / "dev").mkdir()
        for gpu in range(2):  # clones of /dev/null: Slurm hands out device files, whatever they are
            device = self.folder / "dev" / f"nvidia{gpu}"
            done = subprocess.run(["mknod", "-m", "666", device, "c", "1", "3"], capture_output=True, text=True)
            if done.returncode:
                raise NoSlurm(f"no device files can be made here: {done.stderr.strip()}")
        gres = f"AutoDetect=off\nNodeName=n[1-3] Name=gpu File={self.folder}/dev/nvidia[0-1]\n"
        (self.folder / "gres.conf").write_text(gres)
        key = self.folder / "slurm.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        Path("/run/slurm").mkdir(mode=0o755, exist_ok=True)
        self._daemon("slurmctld", "-D", "-i", "-c", "-f", str(self.conf))
        # One after the other: both replace the socket /run/slurm/sack.socket, and at once one of them fails.
        for number, node in enumerate(NODES):
            self.start_node(node)
            try:
                self.wait_idle(60, number + 1)
            except TimeoutError as error:
                raise NoSlurm(f"node {node} is not idle after 60 s: {error}") from None

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-D", "-N", node, "-f", str(self.conf))
        self.nodes[node] = [*self.daemons.values()][-1]

    def kill_node(self, node: str) -> None:
        """Kill a node's slurmd, and the tasks that it has started with what watches over them."""
        self.nodes[node].kill()
        self.nodes[node].wait()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURMD_NODENAME") == node:
                    parent = process.parent()
                    process.kill()
                    if parent and parent.name().startswith("slurmstepd"):
                        parent.kill()

    def _daemon(self, program: str, *arguments: str) -> None:
        log = (self.folder / f"{program}{len(self.daemons)}.out").open("w")
        self.daemons[log.name] = subprocess.Popen([program, *arguments], stdout=log, stderr=subprocess.STDOUT)

    def stop(self) -> None:
        if self.daemons:
            self.command("scancel", "--state=RUNNING", check=False)
            self.command("scancel", "--state=PENDING", check=False)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def environment(self) -> dict[str, str]:
        """For Slurm's commands: this process's, without what a launcher or another Slurm would have set."""
        ours = {"SLURM_CONF": str(self.conf)}
        launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        return {k: v for k, v in os.environ.items() if k not in launcher and not k.startswith("SLURM_")} | ours

    def command(self, *command: str, cwd: Path | None = None, check: bool = True, **env: str) -> str:
        """Run one of Slurm's commands; what it printed on stdout."""
        done = subprocess.run(
            command, env=self.environment() | env, cwd=cwd, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def submit(self, *arguments: str, cwd: Path | None = None, **env: str) -> str:
        """`sbatch ...`; the job's id."""
        return self.command("sbatch", "--parsable", *arguments, cwd=cwd, **env)

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        fields = self.command("scontrol", "--oneliner", "show", "job", job).split(" ")
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, job: str, *states: str, timeout: float = 120) -> dict[str, str]:
        """Wait until the job is in one of `states`, by default ended; its fields."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        by_name: dict[str, str] = {}

        def reached() -> bool:
            by_name.update(self.job(job))
            return by_name["JobState"] in (states or ended)

        poll(reached, timeout, lambda: f"job {job} is {by_name.get('JobState')}, awaited: {states or 'its end'}")
        return by_name

    def wait_idle(self, timeout: float = 60, nodes: int = len(NODES)) -> None:
        def idle() -> bool:
            counts = self.command("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D", check=False).split()
            return counts == [str(nodes)]

        poll(idle, timeout, lambda: self.command("sinfo", check=False))


def own_address() -> str:
    """This machine's address, as the nodes of a cluster have one; the loopback address if it has no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect(("192.0.2.1", 9))  # chooses a network device, and sends nothing
        except OSError:
            return "127.0.0.1"
        return way.getsockname()[0]


def poll(condition: Callable[[], bool], timeout: float, message: Callable[[], str], interval: float = 0.2) -> None:
    """Wait until `condition()` holds; raises TimeoutError with `message()` after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(message())
        time.sleep(interval)
