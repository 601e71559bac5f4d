"""Plans: what is left out, the work of a line, the largest micro-batch of each, prices, and a program's places."""

import json
import sys
from dataclasses import replace

import pytest

from ds_cmli.common import cli
from ds_cmli.common.errors import UserError
from ds_cmli.fits.plan import Need, Search, Settings, Step, Work, grid, in_order
from ds_cmli.fits.plan_programs import MICRO_BATCH, STEPS, Program, command
from ds_cmli.fits.plan_table import devices, make, read_prices
from tests.fits.test_fits import script

T4, A100 = "T4 16GB", "A100 80GB"
OWN = Settings(2, False, False, False)


class Counted:
    """A training of which 1 GB per pair is needed, half of it with checkpointing, and 10 GB without offload."""

    def __init__(self, step: Step):
        self.step, self.asked = step, []

    def measure(self, settings: Settings, micro_batch: int, gpu: str = "") -> Need:
        self.asked.append((settings, micro_batch))
        if settings.stage == 3:
            raise UserError("no stage 3")
        size = micro_batch * (0.5 if settings.checkpointing else 1.0) + (0 if settings.offload else 10)
        room = {T4: 15, A100: 84}
        return Need(int(size * 1e9), {name: int(size == 14) for name in (T4, A100) if size < room[name]})

    def start(self, settings: Settings, micro_batch: int) -> str:
        return f"start {settings} {micro_batch}"


def test_what_is_left_out_is_named():
    settings, left_out = grid(Step(OWN, 8, 2))
    assert settings[0] == OWN and len(settings) == len(set(settings)) == 12
    assert {one.stage for one in settings} == {2, 3} and not any(one.offload and one.lora for one in settings)
    assert [reason.partition(":")[0] for reason in left_out] == ["stages 0 and 1", "offload with LoRA"]
    settings, left_out = grid(Step(OWN, 8, 1))
    assert {(one.stage, one.offload) for one in settings} == {(2, False), (2, True), (0, False)}
    assert left_out[:2] == ["other stages: on one rank they divide nothing", "offload at stage 0: DeepSpeed has none"]
    assert grid(Step(Settings(checkpointing=False), 8, 1))[0] == [
        Settings(checkpointing=False), Settings(checkpointing=True)
    ]  # fmt: skip
    both = replace(OWN, offload=True, lora=True)
    assert grid(Step(both, 8, 2))[0][0] == both


def test_the_work_of_a_line_counted_by_hand():
    step = Step(OWN, 8, 4, caching=True)
    assert step.work(OWN, 8) == Work(1.0, 2, 0.0)
    assert step.work(replace(OWN, checkpointing=True), 8) == Work(4 / 3, 2, 0.0)
    # Twice, the second forward of caching; at stage 2 gradients are reduced twice, and weights gathered once.
    assert step.work(OWN, 4) == Work(4 / 3, 3, 0.0)
    assert step.work(replace(OWN, stage=1), 4) == Work(4 / 3, 2, 0.0)
    # Weights for forward and backward, each time, and for the second forward.
    assert step.work(replace(OWN, stage=3), 8) == Work(1.0, 3, 0.0)
    assert step.work(replace(OWN, stage=3), 4) == Work(4 / 3, 8, 0.0)
    # A fourth of the gradients down, and of the weights up.
    assert step.work(replace(OWN, offload=True), 8) == Work(1.0, 2, 0.5)
    assert replace(step, world_size=1, caching=False).work(OWN, 2) == Work(1.0, 0, 0.0)


@pytest.mark.parametrize("pairs", [1, 12, 64, 97])
def test_each_line_has_the_largest_that_fits_by_a_prediction_of_its_own(pairs):
    step = Step(replace(OWN, lora=None), pairs, 2, caching=True)
    training, told = Counted(step), []
    search = Search(training, [T4, A100], told.append)
    lines = search.lines(grid(step)[0])
    sizes = [n for n in range(1, pairs + 1) if pairs % n == 0]
    for settings in grid(step)[0]:
        if settings.stage == 3:
            assert f"{settings}: no stage 3" in search.refused
            continue
        for gpu in (T4, A100):
            most = max((n for n in sizes if gpu in training.measure(settings, n).fits), default=0)
            named = [line.micro_batch for line in lines if line.settings == settings and gpu in line.gpus]
            assert named == [most] * bool(most)
    assert all((line.settings, line.micro_batch) in training.asked for line in lines)
    assert told[0].endswith("predictions") and len(told) <= 1 + len(lines) * 5
    first = in_order(lines, OWN, {})[0]
    assert first.settings.offload is False and first.work.flops == min(
        line.work.flops for line in lines if line.gpus and not line.settings.offload
    )


def test_the_proposal_is_the_least_work_on_the_cheapest_gpu(capsys):
    step = Step(replace(OWN, lora=None), 8, 2, caching=True)
    prices = {T4: 0.5, A100: 4.0}
    assert make(Counted(step), [T4, A100], prices, lambda line: None) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-2] == "the least work that fits: ZeRO-2, micro-batch 8 x 1, on 2 x A100 80GB: 18.00 of 84.98 GB"
    assert out[-1] == "start ZeRO-2 8" and "the lowest price: 1.00 per hour for 2 x T4 16GB, with " in out[-3]
    assert out[1].split() == [
        "2", "off", "off", "-", "8", "x", "1", "18.00", "1.00", "2", "0.00", "8.00", "A100", "80GB"
    ]  # fmt: skip
    # 14 GB of 15 fit as the cache is returned: what fits without comes first.
    step = Step(replace(OWN, lora=None, offload=None), 4, 2)
    assert make(Counted(step), [T4], {}, lambda line: None) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[2].endswith("T4 16GB*") and out[3].startswith("* only as PyTorch's allocator returns its cache")
    assert out[-1] == "start ZeRO-2 + checkpointing 4"
    step = replace(step, own=replace(step.own, checkpointing=None))
    make(Counted(step), [T4], {}, lambda line: None)
    assert ": 14.00 of 15.64 GB, only as PyTorch's allocator returns its cache (1 retry)\n" in capsys.readouterr().out
    step = Step(replace(OWN, lora=None, offload=None), 97, 2)
    none = type("None_", (Counted,), {"measure": lambda self, *_: Need(9 * 10**11, {})})
    assert make(none(step), [T4], {}, lambda line: None) == 3
    assert capsys.readouterr().out.splitlines()[-1].startswith("nothing fits on T4 16GB: ")
    with pytest.raises(UserError, match=r"^ZeRO-3: no stage 3$"):
        make(Counted(replace(step, own=replace(OWN, stage=3))), [T4], {}, lambda line: None)


def test_prices(tmp_path):
    def read(text: str, name: str = "prices.csv") -> dict[str, float]:
        (tmp_path / name).write_text(text)
        return read_prices(str(tmp_path / name))

    assert (
        read("GPU,price\nT4,0.5\n\nA100 80GB,3\n")
        == {T4: 0.5, A100: 3.0}
        == read('T4 = 0.5\n"A100 80GB" = 3\n', "prices.toml")
    )
    (tmp_path / "bom.csv").write_text("GPU,price\nT4,0.5\n", encoding="utf-8-sig")
    assert read_prices(str(tmp_path / "bom.csv")) == {T4: 0.5}
    assert devices("a100 80gb", str(tmp_path / "prices.csv"))[0] == [A100]
    with pytest.raises(UserError, match="no price of H100"):
        devices("H100", str(tmp_path / "prices.csv"))
    for text, name, line in (
        ("", "a.csv", "which has no price: write lines like A100 80GB,1.80"),
        ("", "a.toml", "which has no price"),
        ("GPU,price\n", "a.csv", "which has no price"),
        ("T4,0.5\nTX,1\n", "a.csv", "has 'TX': give one of T4 16GB, "),
        ("TX,1\n", "a.csv", "has 'TX'"),
        ("T4,cheap\n", "a.csv", "T4 has 'cheap': give a price above 0"),
        ("T4,nan\n", "a.csv", "give a price above 0"),
        ("L4,$0.80\nT4,1\n", "a.csv", "has 'L4'"),
        ("T4,$0.50\n", "a.csv", "T4 has '.0.50': give a price above 0, a plain number"),
        ('T4,"0.5\n', "a.csv", "which cannot be read: unexpected end of data"),
        ("T4,-1\n", "a.csv", "give a price above 0"),
        ("GPU;price\nT4;1\n", "a.csv", "has 'T4;1': give one of"),
        ("T4\n", "a.csv", "T4 has '': give a price"),
        ("T4,1\nT4 16GB,2\n", "a.csv", "T4 16GB twice"),
        ("T4 = true", "a.toml", "T4 has True"),
        ("T4 = ", "a.toml", "which cannot be read"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=line):
            read(text, name)
    with pytest.raises(UserError, match=r"--prices is 'none.csv': No such file"):
        read_prices("none.csv")


HF = ("train.py", "--deepspeed", "{}", "-b", "{{}}", "--accumulate={{accumulation}}", "{{checkpointing:--ckpt|}}")


def program(folder, content: dict, words=HF, ranks=2, batch=8) -> Program:
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    return Program(tuple(word.format(path) for word in words), [T4], ranks, batch, str(folder / "plan.json"))


def test_a_program_is_changed_by_its_places_and_its_json(tmp_path):
    auto = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}, "x": 1}
    planned = program(tmp_path, auto)
    assert planned.step == Step(Settings(2, False, False, None), 8, 2)
    plain = Settings(2, False, False, None)
    path = str(tmp_path / "plan.json")
    first = f"deepspeed --num_gpus 2 train.py --deepspeed {path} -b"
    assert planned.start(plain, 4) == f"{first} 4 --accumulate=2"
    assert json.loads((tmp_path / "plan.json").read_text()) == auto
    assert planned.start(Settings(3, True, True, None), 8) == f"{first} 8 --accumulate=1 --ckpt"
    offloaded = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert json.loads((tmp_path / "plan.json").read_text()) == auto | {"zero_optimization": offloaded}
    # A JSON with numbers needs no place, and no --batch.
    numbers = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3, "train_batch_size": 24}
    planned = program(tmp_path, numbers, ("-m", "package", "--deepspeed_config={}"), batch=None)
    assert (planned.step.pairs, planned.step.own) == (12, Settings(0, None, False, None))
    assert planned.start(planned.step.own, 6) == f"deepspeed --num_gpus 2 --module package --deepspeed_config={path}"
    changed = {"train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": 2, "train_batch_size": 24}
    assert json.loads((tmp_path / "plan.json").read_text()) == changed | {"zero_optimization": {"stage": 0}}
    # The batch of all ranks alone makes a micro-batch, as in DeepSpeed.
    planned = program(tmp_path, {"train_batch_size": 24}, ("a.py", "--deepspeed_config={}"), batch=None)
    assert (planned.step.pairs, planned.json_of(planned.step.own, 4)[STEPS]) == (12, 3)
    alone = Program(("a.py", "{}", "{lora}"), [T4], 1, 8, path)
    assert alone.start(Settings(lora=True), 8) == "python a.py 8 True" and alone.step.micro_batches == [8]
    assert Program(("a.py", "{}"), [T4], 2, 8, path).start(Settings(), 8) == "torchrun --nproc_per_node 2 a.py 8"
    rendezvous = "--rdzv-backend c10d --rdzv-endpoint NODE:29400"
    several = Program(("a.py", "{}"), [T4], 18, 8, path).start(Settings(), 8)
    assert several == f"torchrun --nproc_per_node 6 --nnodes 3 {rendezvous} a.py 8"
    assert program(tmp_path, auto, ranks=16).start(plain, 8).startswith("deepspeed --hostfile hostfile train.py ")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({MICRO_BATCH: -2}, f'{MICRO_BATCH} is -2: give a number from 1 on, or "auto"'),
        ({MICRO_BATCH: True}, f'{MICRO_BATCH} is true: give a number from 1 on, or "auto"'),
        ({MICRO_BATCH: 2, STEPS: "2"}, f'{STEPS} is "2": give a number from 1 on, or "auto"'),
        ({"zero_optimization": 2}, "zero_optimization is 2: give an object"),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage is 7: give one of 0 to 3"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is true: give one of 0 to 3"),
        ({"zero_optimization": {"offload_optimizer": 1}}, "zero_optimization.offload_optimizer is 1: give an object"),
    ],
    ids=lambda value: str(value)[-40:],
)  # fmt: skip
def test_a_damaged_json_is_one_line(tmp_path, content, line):
    with pytest.raises(UserError) as raised:
        program(tmp_path, content)
    assert str(raised.value) == f"{tmp_path / 'ds.json'}: {line}"


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    name = script(tmp_path, "")
    monkeypatch.chdir(tmp_path)
    for words, line in (
        (("--", "a.py"), "the script 'a.py' is not there: "),
        (("--batch", "8", "--", name, "-b", "8"), "nothing sets the micro-batch: write {} for it"),
        (("--", name, "-b", "{}"), "--batch is missing: "),
        (("--batch", "8", "--", name, "--deepspeed", "no.json", "{}"), "--deepspeed is 'no.json': No such"),
        (("--gpu", "TX", "--", name, "{}"), "--gpu is 'TX': give one of"),
        (("--prices", "no.csv", "--", name, "{}"), "--prices is 'no.csv': No such"),
        (("--batch", "0", "--", name, "{}"), "Invalid value for '--batch'"),
    ):
        monkeypatch.setattr(sys, "argv", ["plan", *words])
        code, printed = cli.exit_code(command), capsys.readouterr()
        assert (code, printed.out) == (2, "") and printed.err.startswith(f"error: {line}"), printed.err
        assert printed.err.count("\n") == 1


TRAINER = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments
arguments = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()[0]
texts = torch.randint(500, (64, 32))
data = [{"input_ids": text, "labels": text} for text in texts]
sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 500, "bos_token_id": 1, "eos_token_id": 1}
Trainer(GPT2LMHeadModel(GPT2Config(use_cache=False, **sizes)), arguments, train_dataset=data).train()
"""


def trainer(tmp_path) -> Program:
    words = ("--output_dir", "out", "--report_to", "none", "--save_strategy", "no", "--bf16", "--deepspeed", "{}")
    words = (script(tmp_path, TRAINER), *words, "--per_device_train_batch_size", "{{}}")
    words += ("--gradient_accumulation_steps", "{{accumulation}}", "--gradient_checkpointing", "{{checkpointing}}")
    auto = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
    }
    return program(tmp_path, auto | {"zero_optimization": {"stage": 2}}, words)


@pytest.mark.slow
def test_a_trainer_is_planned_and_each_setting_reaches_it(tmp_path, monkeypatch):
    """Stages, checkpointing and offload each take other memory; half the micro-batch takes less."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    planned = trainer(tmp_path)
    plain = Settings(2, False, False, None)
    measured = [
        planned.measure(plain, 8).device,
        planned.measure(plain, 4).device,
        planned.measure(replace(plain, checkpointing=True), 8).device,
        planned.measure(replace(plain, offload=True), 8).device,
        planned.measure(replace(plain, stage=3), 8).device,
    ]
    assert len({*measured}) >= 3 and measured[0] == max(measured[0], *measured[2:4])
