"""What a signal does to a run, for each way to start it: `python tests/faults/signal_table.py [WAY ...] [-o FOLDER]`

Two ranks of tiny steps (one under plain `python`) get a signal at one rank, or at the launcher. For each case a row:
the launcher's exit code, the step of the newest checkpoint of those done, ranks that are left 30 s after, and whether
the next start, by the same command, ends with the metrics and weights of a run that nobody has disturbed, bit for bit.
The rows of `srun` and of a Slurm job need a Slurm that can be started here, beside which no other runs.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.config.test_mistakes import pairs
from tests.conftest import ROOT, clean_environment, free_port, rank_environments
from tests.metrics_file import metrics
from tests.processes import Program
from tests.slurm.cluster import Cluster, poll
from tests.slurm.jobs import steps_done

STEPS = 60
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGKILL)
TARGETS = ("a rank", "the launcher")
TRAIN = str(ROOT / "ds_cmli" / "train.py")
BIN = Path(sys.executable).parent


@dataclass
class Row:
    way: str
    target: str
    name: str
    code: str = ""
    checkpoint: str = ""
    left: int = 0
    resumed: str = ""

    def __str__(self) -> str:
        to = f"{self.name} to {self.target}"
        return f"| {self.way} | {to} | {self.code} | {self.checkpoint} | {self.left} | {self.resumed} |"


HEAD = "| started by | signal | exit code | newest checkpoint | ranks left | next start |\n|---|---|---|---|---|---|"


class Table:
    def __init__(self, folder: Path, cluster: Cluster | None = None):
        self.folder, self.cluster = folder, cluster
        self.data = pairs(folder / "pairs", count=64)
        self.references: dict[int, Path] = {}

    def options(self, run: Path) -> list[str]:
        options = ["--preset", "tiny", "--steps", str(STEPS), "--micro-batch", "16", "--data", self.data]
        return [*options, "--set", "run.watchdog=10", "--output-dir", str(run)]

    def command(self, way: str, run: Path) -> list[str]:
        starts = {
            "python": [sys.executable],
            "torchrun": [str(BIN / "torchrun"), "--nproc_per_node=2", f"--master_port={free_port()}"],
            "torchrun --signals-to-handle": [
                str(BIN / "torchrun"), "--nproc_per_node=2", f"--master_port={free_port()}",
                "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGUSR2",
            ],
            "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators=2", f"--master_port={free_port()}"],
            "srun": ["srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=0", sys.executable],
        }  # fmt: skip
        return [*starts[way], TRAIN, *self.options(run)]

    def start(self, way: str, run: Path) -> subprocess.Popen:
        env = clean_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if way == "srun":
            assert self.cluster is not None
            env = self.cluster.environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            env["MASTER_ADDR"] = "127.0.0.1"
        command = self.command(way, run)
        with open(f"{run}.log", "a") as out:
            return subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, process_group=0)

    def reference(self, ranks: int) -> Path:
        if ranks not in self.references:
            run = self.folder / f"straight{ranks}"
            assert self.forked(run, ranks) == 0, log(run)
            self.references[ranks] = run
        return self.references[ranks]

    def forked(self, run: Path, ranks: int) -> int:
        """The exit code of a training of forked ranks; of several, one that is not 0."""
        command, log_file = [TRAIN, *self.options(run)], Path(f"{run}.log")
        processes = [Program(command, env, ROOT, log_file) for env in rank_environments(ranks)]
        codes = [process.wait(300) for process in processes]
        return next(filter(None, codes), 0)

    def start_again(self, way: str, run: Path) -> int:
        """The exit code of the next start."""
        return self.start(way, run).wait(300)

    def row(self, way: str, target: str, number: signal.Signals) -> Row:
        row = Row(way, target, number.name)
        reference = self.reference(1 if way == "python" else 2)
        run = self.folder / f"{way.replace(' ', '')}-{target}-{number.name}"
        process = self.start(way, run)
        try:
            poll(
                lambda: steps_done(run) >= 3 or process.poll() is not None, 120, lambda: Path(f"{run}.log").read_text()
            )
            assert process.poll() is None, log(run)
            at = process.pid if target == "the launcher" else ranks_of(run)[-1]
            os.kill(at, number)
            row.code = str(shell_code(process.wait(90)))
        except subprocess.TimeoutExpired:
            row.code = "none in 90 s"
        end = time.monotonic() + 30
        while ranks_of(run) and time.monotonic() < end:
            time.sleep(0.2)
        left = ranks_of(run)
        row.left = len(left)
        for pid in (*left, process.pid):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        poll(lambda: not ranks_of(run), 30, lambda: f"ranks of {run} cannot be killed")
        self.finish(row, run, reference)
        return row

    def finish(self, row: Row, run: Path, reference: Path) -> None:
        """What has been saved, and the next start."""
        latest = run / "checkpoint" / "latest"
        row.checkpoint = f"{latest.read_text()} of {steps_done(run)}" if latest.exists() else "none"
        code = self.start_again(row.way, run)
        equal = code == 0 and metrics(run) == metrics(reference)
        weights = [folder / "student.safetensors" for folder in (run, reference)]
        equal = equal and weights[0].read_bytes() == weights[1].read_bytes()
        row.resumed = "bit-identical" if equal else f"differs (exit code {code})"

    def during_the_check(self, name: str) -> Row:
        """A Slurm job's signal during its node check, which a stand-in for Python makes long."""
        row = Row("sbatch", "the job during the node check", name)
        assert self.cluster is not None
        run = self.folder / f"check-{name}"
        slow = self.folder / f"slow-{name}"
        mark = self.folder / f"checking-{name}"
        slow.write_text(
            f'#!/bin/bash\nif [[ $1 == *check.py && ! -e "{mark}" ]]; then touch "{mark}"; sleep 30; fi\n'
            f'exec {sys.executable} "$@"\n'
        )
        slow.chmod(0o755)
        env = {"DS_CMLI_PYTHON": str(slow), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        job = self.cluster.submit("--ntasks=2", str(ROOT / "slurm" / "train.sh"), *self.options(run),
                                  cwd=self.folder, **env)  # fmt: skip
        poll(mark.exists, 60, lambda: "no node check")
        time.sleep(0.5)
        sent = {
            "TERM": ["--signal=TERM"],
            "USR1": ["--signal=USR1"],
            "USR1 to the script": ["--batch", "--signal=USR1"],
        }
        self.cluster.command("scancel", *sent[name], job)
        state = self.cluster.wait(job, timeout=240)
        row.code = f"{state['JobState']}, requeued {state['Restarts']} times"
        row.checkpoint = (run / "checkpoint" / "latest").read_text() if run.exists() else "none"
        row.left = len(ranks_of(run))
        equal = run.exists() and metrics(run) == metrics(self.reference(2))
        row.resumed = "bit-identical" if equal else "differs"
        return row


def log(run: Path) -> str:
    return Path(f"{run}.log").read_text()


def shell_code(code: int) -> int:
    """As a shell tells it."""
    return 128 - code if code < 0 else code


def ranks_of(run: Path) -> list[int]:
    """The processes of a run's ranks, the last rank last; not their launchers or data loaders."""
    by_name = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            env = (process / "environ").read_bytes()
            parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            continue
        if (
            words[0].split(b"/")[-1].startswith(b"python")
            and str(run).encode() in words
            and TRAIN.encode() in words[1:5]  # behind what stands for Python, as processes.python() does
        ):
            given = dict(word.split(b"=", 1) for word in env.split(b"\0") if b"=" in word)
            rank = given.get(b"RANK") or given.get(b"SLURM_PROCID") or b"0"
            by_name[int(process.name)] = (int(parent), int(rank))
    own = [(rank, pid) for pid, (parent, rank) in by_name.items() if parent not in by_name]
    return [pid for _, pid in sorted(own)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", default=["python", "torchrun", "torchrun --signals-to-handle", "deepspeed",
                                                    "srun", "sbatch"])  # fmt: skip
    parser.add_argument("--to", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--signals", nargs="+", type=signal.Signals.__getitem__, default=SIGNALS, metavar="SIGTERM")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    # A shell starts what runs in its background with this signal ignored, which launchers would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with ExitStack() as stack:
        folder = given.output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(exist_ok=True)
        cluster = None
        if {"srun", "sbatch"} & {*given.ways}:
            (folder / "slurm").mkdir()
            cluster = Cluster(folder / "slurm")
            stack.callback(cluster.stop)
            cluster.start()
        table = Table(folder, cluster)
        print(HEAD, flush=True)
        for way in given.ways:
            if way == "sbatch":
                for name in ("TERM", "USR1", "USR1 to the script"):
                    print(table.during_the_check(name), flush=True)
                continue
            for target in ("a rank",) if way == "python" else given.to:
                for number in given.signals:
                    print(table.row(way, target, number), flush=True)


if __name__ == "__main__":
    main()
