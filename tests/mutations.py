"""Mutations of the package, and which tests catch them: `python tests/mutations.py [NAME ...]`

Each is one mistake that a developer could make, and that no type and no shape shows. It is made in a copy of the
repository, in which the tests of the rooms concerned run: the quick ones, and where these pass, the marked ones. mutmut
and cosmic-ray make mutations of every operator and number, two a line, but remove no call, such as a collective.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKED = "(slow or null_gpu or slurm) and not soak and not gpu"
SECONDS = 1800  # a mutation that makes ranks wait for each other is caught by its tests' own limits before that


@dataclass(frozen=True)
class Mutation:
    """One mistake: `old`, which `file` has once, becomes `new`.

    `tests` are files and folders of tests, which would show it.
    """

    name: str
    mistake: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "allocator-rest",
        "a rest of exactly 1 MiB of a large block is split off",
        "allocator/allocator.py",
        "return left > SMALL_REQUEST and",
        "return left >= SMALL_REQUEST and",
        ("allocator",),
    ),
    Mutation(
        "checkpoint-checksum",
        "the first file of a checkpoint is not verified",
        "checkpoint/files.py",
        "[part::parts]",
        "[part + 1 :: parts]",
        ("checkpoint",),
    ),
    Mutation(
        "checkpoint-averages",
        "a resumed run averages its weights from where it resumes",
        "checkpoint/restore.py",
        "        load_averages(path, train_engine)\n",
        "",
        ("engine/test_ema.py", "checkpoint"),
    ),
    Mutation(
        "ring-gradient",
        "a text's gradient that has come from another rank is not passed on: wrong from three ranks on",
        "cmli/ring.py",
        "self.transfer.wait().add_(grad.to(wide))",
        "self.transfer.wait().copy_(grad.to(wide))",
        ("cmli", "losses/test_cached.py", "distributed"),
    ),
    Mutation(
        "column-gradient",
        "the gradient of the softmax over images lacks the other ranks' share",
        "cmli/collectives.py",
        "        dist.all_reduce(grad, group=ctx.group)  # collective: every rank's loss may use every column\n",
        "",
        ("cmli", "losses", "distributed"),
    ),
    Mutation(
        "cut-columns",
        "a column's mass that may be left out is that of this rank's images",
        "cmli/cut.py",
        "                dist.all_reduce(total, group=self.group)  # collective, G numbers\n",
        "                pass\n",
        ("cmli", "losses"),
    ),
    Mutation(
        "chunked-weight",
        "a maximum of the other side is weighted by this side's number of positions",
        "cmli/chunked/backward.py",
        "self._pairs(self.grad_other).mul_(self.other.scale[self.other_chunk.sequences()])",
        "self._pairs(self.grad_other).mul_(self.own.scale[self.own_chunk.sequences(), None])",
        ("cmli",),
    ),
    Mutation(
        "triton-tie",
        "of two equal patches in different blocks of an image the last one gets the gradient",
        "cmli/triton/forward_kernel.py",
        "better = (column > best) |",
        "better = (column >= best) |",
        ("cmli",),
    ),
    Mutation(
        "line-checksums",
        "a line that stands twice agrees with the checksum of one",
        "common/checksums.py",
        "place = sums.index(_of_line(line), place) + 1",
        "place = sums.index(_of_line(line), place)",
        ("common", "report"),
    ),
    Mutation(
        "warmup",
        "the warm-up begins at rate 0 and reaches the full rate one update late",
        "config/schedule.py",
        "update = done + 1",
        "update = done",
        ("config", "engine"),
    ),
    Mutation(
        "aspect-mask",
        "a picture of any aspect has one patch of padding",
        "data/aspect.py",
        "torch.arange(patches, device=grid.device) < grid.prod",
        "torch.arange(patches, device=grid.device) <= grid.prod",
        ("data", "models/test_any_aspect.py"),
    ),
    Mutation(
        "flags",
        "ranks stop only where all of them are signalled",
        "distributed/process_group.py",
        "dist.all_reduce(raised, op=dist.ReduceOp.MAX",
        "dist.all_reduce(raised, op=dist.ReduceOp.MIN",
        ("distributed", "faults"),
    ),
    Mutation(
        "average-of-skipped",
        "a skipped step moves the average of the weights",
        "engine/train_engine.py",
        "self.ema is not None and self.engine.was_step_applied()",
        "self.ema is not None",
        ("engine", "faults/test_nonfinite.py"),
    ),
    Mutation(
        "caching-factor",
        "with gradient caching the losses over pairs weigh as much as one micro-batch's",
        "engine/gradient_caching.py",
        "factor = self.accumulation / self.scale",
        "factor = 1.0 / self.scale",
        ("engine",),
    ),
    Mutation(
        "recall-ties",
        "a negative of the positive's score counts as better",
        "evaluate/metrics.py",
        "above = (~(scores <= best) & negative)",
        "above = (~(scores < best) & negative)",
        ("evaluate",),
    ),
    Mutation(
        "prompts-share",
        "the last prompts of the classes are no rank's",
        "evaluate/zero_shot.py",
        "count = -(-len(prompts) // distributed.world_size())",
        "count = len(prompts) // distributed.world_size()",
        ("evaluate",),
    ),
    Mutation(
        "export-mask",
        "the exported text tower counts class and separator tokens as words",
        "export/towers.py",
        "mask = mask & (input_ids != special)",
        "mask = mask & (input_ids != input_ids + 1)",
        ("export",),
    ),
    Mutation(
        "hung-ranks",
        "of several hung ranks one is named",
        "faults/watchdog.py",
        "for r in ranks[:8]]",
        "for r in ranks[:1]]",
        ("faults",),
    ),
    Mutation(
        "device-memory",
        "what a GPU holds outside the allocator leaves no less room for a step",
        "fits/answer.py",
        "replay(events, limit=room.bytes - outside)",
        "replay(events, limit=room.bytes)",
        ("fits",),
    ),
    Mutation(
        "index-padding",
        "the padding of pictures of any aspect can be found by a text",
        "inference/index.py",
        "patches = torch.where(mask[..., None], patches, patches[:, :1])",
        "patches = torch.where(mask[..., None], patches, patches)",
        ("inference", "models/test_any_aspect.py"),
    ),
    Mutation(
        "cached-scale",
        "with gradient caching the temperatures' gradients keep the loss scale of fp16",
        "losses/cached.py",
        "upcast(grad) / self.step.scale",
        "upcast(grad)",
        ("losses/test_cached.py", "engine"),
    ),
    Mutation(
        "match-padding",
        "a token's teacher patch may be one that its picture has not",
        "losses/distillation.py",
        "similarity.masked_fill_(~mask[:, None, :], -torch.inf)",
        "similarity.masked_fill_(~mask[:, None, :], 0.0)",
        ("losses", "models/test_any_aspect.py"),
    ),
    Mutation(
        "shares",
        "a rank's gradients are predicted by the wrong one of two shares",
        "memory/shares.py",
        "size * self.elements[rank][group] // self.elements[self.rank][group]",
        "size * self.elements[self.rank][group] // self.elements[rank][group]",
        ("memory",),
    ),
    Mutation(
        "lora-scale",
        "adapters are merged by alpha alone",
        "models/lora.py",
        "student.lora_scale = config.lora_alpha / config.lora_rank",
        "student.lora_scale = config.lora_alpha",
        ("models/test_lora.py", "export"),
    ),
    Mutation(
        "pooled-token",
        "a causal text encoder is pooled one token early",
        "models/transformers_text.py",
        "attention_mask.sum(1) - 1]",
        "attention_mask.sum(1) - 2]",
        ("models",),
    ),
    Mutation(
        "standard-error",
        "the standard error is that of the whole population",
        "report/runs.py",
        "statistics.stdev(values)",
        "statistics.pstdev(values)",
        ("report",),
    ),
    Mutation(
        "tensorboard-step",
        "a resumed run hides the step from which it resumes",
        "trackers/tensorboard.py",
        "purge_step=min(step, self.first_step + 1)",
        "purge_step=min(step, self.first_step)",
        ("trackers", "test_metrics.py"),
    ),
    Mutation(
        "lines-kept",
        "a run stopped in an evaluation keeps all of its lines but one",
        "metrics.py",
        "return self.lines - self.evaluations[1]",
        "return self.lines - 1",
        ("test_metrics.py", "checkpoint"),
    ),
)


def copy_of_repository(folder: Path) -> None:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
        if os.path.lexists(ROOT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)


def failing_test(folder: Path, tests: Sequence[str], marks: str = "") -> str | None:
    """The first test in a copy that fails; None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
    command += [*tests, *(("-m", marks) if marks else ())]
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode in (0, 5):  # 5: no test has these marks
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return failed[1] if failed else done.stdout[-2000:] + done.stderr[-2000:]


def caught(mutation: Mutation) -> str:
    """What catches a mutation, in words."""
    tests = [f"tests/{path}" for path in mutation.tests]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "copy")
        copy_of_repository(folder)
        file = folder / "ds_cmli" / mutation.file
        original = file.read_text()
        file.write_text(original.replace(mutation.old, mutation.new))
        for which, marks in (("", ""), ("marked: ", MARKED)):
            if failed := failing_test(folder, tests, marks):
                file.write_text(original)
                also = " FAILS WITHOUT IT, TOO" if failing_test(folder, [failed], marks) else ""
                return which + failed.removeprefix("tests/") + also
    return "NOTHING"


def main(names: list[str]) -> int:
    chosen = [mutation for mutation in MUTATIONS if mutation.name in names or not names]
    results = []
    for mutation in chosen:
        results.append(caught(mutation))
        print(f"| {mutation.file} | {mutation.mistake} | {results[-1]} |", flush=True)
    return int("NOTHING" in results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
