"""A real Slurm on this machine, as root: a controller and three nodes, daemons in the foreground as child processes."""

import os
import stat
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

from tests.ranks import ROOT, clean_environment, free_port, poll

NODES = ("n1", "n2", "n3")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

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


class Cluster:
    def __init__(self, folder: Path):
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.daemons: list[subprocess.Popen] = []
        self.nodes: dict[str, subprocess.Popen] = {}  # the last slurmd of each

    def start(self) -> None:
        """Write the configuration, start the daemons and wait until all nodes are idle."""
        (host,), addresses = (subprocess.check_output(["hostname", x], text=True).split() for x in ("-s", "-I"))
        names = {"host": host, "address": [*addresses, "127.0.0.1"][0]}
        nodes = "\n".join(NODE.format(name=node, port=free_port(), **names) for node in NODES)
        values = {"host": host, "folder": self.folder, "controller_port": free_port(), "nodes": nodes}
        self.conf.write_text(SLURM_CONF.format(**values))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        for name in ("dev", "state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        for gpu in range(2):  # clones of /dev/null: Slurm hands out device files, whatever they are
            os.mknod(self.folder / "dev" / f"nvidia{gpu}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        gres = f"AutoDetect=off\nNodeName=n[1-3] Name=gpu File={self.folder}/dev/nvidia[0-1]\n"
        (self.folder / "gres.conf").write_text(gres)
        key = self.folder / "slurm.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        Path("/run/slurm").mkdir(mode=0o755, exist_ok=True)
        self._daemon("slurmctld", "-D", "-i", "-c")
        # One after the other: both replace the socket /run/slurm/sack.socket, and at once one of them fails.
        for number, node in enumerate(NODES):
            self.start_node(node)
            self.wait_idle(number + 1)

    def _daemon(self, program: str, *arguments: str) -> subprocess.Popen:
        with open(self.folder / f"{program}{len(self.daemons)}.out", "w") as log:
            command = [program, *arguments, "-f", str(self.conf)]
            self.daemons.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        return self.daemons[-1]

    def start_node(self, node: str) -> None:
        self.nodes[node] = self._daemon("slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill a node's slurmd, and the tasks that it has started with what watches over them."""
        self.nodes[node].kill()
        self.nodes[node].wait()
        tasks = list[psutil.Process]()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURMD_NODENAME") == node:
                    tasks.append(process)
        for process in tasks:  # first what would report to the controller how they have ended
            with suppress(psutil.Error):
                parent = process.parent()
                if parent and parent.name().startswith("slurmstepd"):
                    parent.kill()
        for process in tasks:
            with suppress(psutil.Error):
                process.kill()

    def stop(self) -> None:
        if self.daemons:
            self.command("scancel", "--user=root", check=False)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()

    def command(self, *command: str, check: bool = True, **env: str) -> str:
        """Run one of Slurm's commands from the project's folder, and return what it prints on stdout."""
        ours = {k: v for k, v in clean_environment().items() if not k.startswith("SLURM_")}
        ours |= {"SLURM_CONF": str(self.conf), **env}
        done = subprocess.run(command, env=ours, cwd=ROOT, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def submit(self, *arguments: str, **env: str) -> str:
        """Call `sbatch`, and return the job's id."""
        return self.command("sbatch", "--parsable", *arguments, **env)

    def job(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        fields = self.command("scontrol", "--oneliner", "show", "job", job).split(" ")
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, job: str, timeout: float = 120) -> dict[str, str]:
        """Wait until the job has ended, and return its fields."""
        poll(lambda: self.job(job)["JobState"] in ENDED, timeout, lambda: f"job {job}: {self.job(job)}", 0.2)
        return self.job(job)

    def wait_idle(self, nodes: int) -> None:
        idle = ("-h", "-p", "main", "-t", "idle", "-o", "%D")
        sinfo = partial(self.command, "sinfo", check=False)
        poll(lambda: sinfo(*idle) == str(nodes), 60, sinfo, 0.2)
