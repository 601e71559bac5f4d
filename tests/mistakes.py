"""Mistakes of users: see tests/test_mistakes.py."""

from pathlib import Path

from tests import make

JSON = "train --deepspeed_config {folder}/ds.json"
PAIRS = "train --data {folder}/pairs"
WEIGHTS = PAIRS + """ --set 'data.caption_weights={{"text": %s}}'"""
RUN = "evaluate --checkpoint {folder}/run"


def ds_json(content: str | dict):
    content = content if isinstance(content, str) else {"zero_optimization": {"stage": 1}} | content
    return lambda folder: make.json_file(folder / "ds.json", content)


def pairs(folder: Path) -> None:
    make.pairs(folder / "pairs")


def karpathy(folder: Path) -> None:
    make.karpathy(make.pictures(folder, "a.png") / "splits.json", [("a.png", "train", ["a cat"])])


def table(folder: Path) -> None:
    make.pictures(folder, "a.png")
    (folder / "pairs.csv").write_text("filename,text,long\na.png,a cat,a black cat\n")


def keyed_tar(folder: Path) -> None:
    make.shard(folder / "0.tar", [("0.json", b'{"texts": ["a cat"]}'), ("0.png", make.png(0))])


def blank_validation(folder: Path) -> None:
    pairs(folder)
    make.pairs(folder / "blank", 9, empty=range(9))


def run(folder: Path) -> None:
    source = make.pairs(folder / "pairs", 9)
    make.write_run(folder / "run", data={"source": source, "val_source": source})


def classes(folder: Path) -> None:
    run(folder)
    make.pictures(folder / "classes", "cat/1.png", "dog/1.png")
    (folder / "names.txt").write_text("one\n")
    (folder / "templates.txt").write_text("a photo\n")


def empty_classes(folder: Path) -> None:
    run(folder)
    for name in ("cat", "dog"):
        (folder / "classes" / name).mkdir(parents=True)


# A command line, what the one line of the error names, and perhaps what prepares the folder {folder}.
MISTAKES = [
    # Options, settings and DeepSpeed's JSON.
    ("train --preset dmeo", "run.preset is 'dmeo': did you mean 'demo'?"),
    ("train --stpes 3", "--stpes"),
    ("train --steps 3 --epochs 1", "optim.epochs is 1"),
    ("train --lr -1", "optim.lr is -1.0: Input should be greater than 0"),
    ("train --losses global,clmi", "did you mean 'cmli'?"),
    ("train --losses cmli=big", "--losses is 'cmli=big': write NAME or NAME=WEIGHT"),
    (
        "train --losses target_cmli --set loss.target_image_weight=0 --set loss.target_text_weight=0",
        "loss.target_image_weight is 0",
    ),
    ("train --set student.layres=2", "setting of student is 'layres': did you mean 'layers'?"),
    ("train --set layers=2", "--set is 'layers=2': write SECTION.SETTING=VALUE"),
    (f"train --set data.source={'[' * 5000}", "data.source"),
    ("train --set 'optim.lr_factors={{\"text\": 0.1'", "optim.lr_factors is '{\"text\": 0.1': Input should be a valid"),
    ("train --plugin nowhere.at_all", "nowhere"),
    ("train --profile 30:31", "--profile"),
    (JSON, "ds.json"),
    (JSON, "ds.json", ds_json('{"fp16": ')),
    (JSON, "ds.json: ValueError: Duplicate keys", ds_json('{"zero_optimization": {"stage": 1, "stage": 2}}')),
    (JSON, "ds.json", ds_json(f'{{"fp16": {"[" * 3000}')),
    (JSON, "ds.json: ValueError: no JSON object", ds_json("[1]")),
    (JSON, "'zero_optimization'", ds_json({"zero_optimisation": {"stage": 2}})),
    (JSON, "hybrid_engine", ds_json({"hybrid_engine": {"enabled": True}, "pipeline": False})),
    (JSON, "zero_allow_untested_optimizer", ds_json({"optimizer": {"type": "RAdam"}})),
    *(
        (JSON, "could not resume on other ranks", ds_json({"optimizer": {"type": kind}}))
        for kind in ("SGD", "NAdam", "Adamax", "RMSprop", "ASGD", "Adafactor", "Adagrad")
    ),
    (JSON, "could not resume on other ranks", ds_json({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}})),
    (f"train --preset {'x' * 5000}", "known: demo, "),
    (f"train --steps {'x' * 5000}", "--steps"),
    (f"train --data {'x' * 5000}", "data.source"),
    (
        JSON + " --set optim.layer_decay=0.5",
        "scheduler.type is 'WarmupLR', which sets one rate",
        ds_json({"scheduler": {"type": "WarmupLR", "params": {}}}),
    ),
    (JSON, "train_batch_size", ds_json({"train_batch_size": 9, "train_micro_batch_size_per_gpu": 2})),
    # Data.
    ("train --data {folder}/nowhere", "nowhere"),
    ("train --val-data {folder}/nowhere", "data.val_source"),
    (PAIRS, "pairs", lambda folder: (folder / "pairs").mkdir()),
    (PAIRS, "8", lambda folder: make.pairs(folder / "pairs", 5)),
    (PAIRS, "data.max_bad_share", lambda folder: make.pairs(folder / "pairs", empty=range(0, 24, 2))),
    (PAIRS, "23 samples in a row cannot be used", lambda folder: make.pairs(folder / "pairs", broken=range(24))),
    (PAIRS + " --set data.held_out=0.999", "data.held_out", pairs),
    (WEIGHTS % 0, "data.caption_weights.text", pairs),
    (WEIGHTS % "NaN", "data.caption_weights.text", pairs),
    (WEIGHTS % '1, "lnog": 1', "no such captions: known: file_name, text", pairs),
    (WEIGHTS.replace("pairs", "pairs.csv") % '1, "lnog": 1', "no column 'lnog': did you mean 'long'?", table),
    (WEIGHTS % 1 + " --csv-caption-key long", "data.caption_key", pairs),
    (WEIGHTS.replace("pairs", "splits.json") % 1, "data.caption_weights", karpathy),
    (WEIGHTS.replace("pairs", "0.tar") % 1, "0.tar no such captions", lambda folder: make.tar(folder / "0.tar")),
    (WEIGHTS.replace("pairs", "0.tar") % 1, "did you mean 'texts'?", keyed_tar),
    (WEIGHTS.replace("{folder}/pairs", "demo") % 1, "data.caption_weights"),
    (PAIRS + " --set data.caption_weights={{}}", "data.caption_weights", pairs),
    (PAIRS + " --val-data {folder}/blank", "no captions to evaluate on", blank_validation),
    ("train --set data.tokenizer={folder}/nowhere", "data.tokenizer"),
    # Models and their weights.
    ("train --set student.freeze_image=9", "student.freeze_image"),
    ("train --set teacher.block=5", "teacher.block"),
    ("train --set teacher.model=resnet18 --set teacher.overrides={{}}", "resnet18"),
    ("train --set teacher.weights={folder}/nowhere.pt", "nowhere.pt"),
    (
        "train --set student.text_weights={folder}/w.pt",
        "w.pt",
        lambda folder: (folder / "w.pt").write_bytes(b"no weights"),
    ),
    ("train --start-from ~nouser/clip", "student.source is '~nouser/clip': no such file or folder"),
    ("train --set run.compile=blocks --profile-memory 2", "--profile-memory"),
    # Runs that are to go on.
    ("train --resume {folder}/nowhere", "nowhere"),
    ("train --output-dir {folder}/file/run", "file", lambda folder: (folder / "file").write_text("")),
    (f"train --output-dir {{folder}}/{'x' * 300}", "--output-dir"),
    ("train --output-dir ~nouser/run", "run.output_dir is '~nouser/run': Value error, there is no such user"),
    # A prediction, and profiling a training.
    ("memory --gpu 'No Such Card'", "--gpu"),
    ("memory --gpu-memory 48GB", "--sm"),
    ("memory --gpu-memory 48GB --sm 6.1", "--sm"),
    ("memory --fit much", "--fit"),
    ("memory --plot memory.txt", "--plot is 'memory.txt': end its name in"),
    ("memory --set student.layers=1 --losses global --json {folder}/nowhere/report.json", "report.json"),
    ("memory --set student.layers=9", "student.layers"),
    ("memory --set student.text_backbone=someone/no-such-model", "someone/no-such-model"),
    (
        "memory --deepspeed_config {folder}/ds.json",
        "offload_param",
        ds_json({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}),
    ),
    ("train --steps 4 --profile 3:2", "--profile"),
    ("train --steps 4 --profile 1:2 --profile-memory 2", "--profile"),
    # An evaluation, match maps and an export.
    ("evaluate --checkpoint {folder}/nowhere", "nowhere"),
    ("evaluate --checkpoint {folder}", "is no run"),
    (RUN + " --data {folder}/nowhere", "nowhere", run),
    (RUN + " --choices {folder}/names.txt", "names.txt", classes),
    (RUN + " --ema", "--ema", run),
    (RUN + " --json {folder}/nowhere/found.json", "found.json", run),
    (RUN + " --zero-shot {folder}/nowhere", "--zero-shot", run),
    (RUN + " --zero-shot {folder}/classes --class-names {folder}/names.txt", "names.txt", classes),
    (RUN + " --zero-shot {folder}/classes --templates {folder}/templates.txt", "templates.txt", classes),
    (RUN + " --zero-shot {folder}/pairs", "give a folder with folders of pictures", run),
    (RUN + " --boxes {folder}/pairs", "give Flickr30k Entities' folder, with Annotations/", run),
    (RUN + " --data demo --split test", "the demo has its own two", run),
    (RUN + " --zero-shot {folder}/classes", "its folders of classes hold no picture", empty_classes),
    (RUN + " --zero-shot ~nouser/x", "--zero-shot ~nouser/x", run),
    (RUN + " --boxes ~nouser/x", "--boxes is '~nouser/x'", run),
    ("evaluate ~nouser/x --data demo", "~nouser/x"),
    ("visualize {folder}/nowhere", "nowhere"),
    ("visualize {folder}/run --image {folder}/pairs/0.png", "--text", run),
    ("visualize {folder}/run --pairs first", "--pairs", run),
    ("export {folder}/nowhere {folder}/out", "nowhere"),
    ("export {folder}/run {folder}/out --ema", "ema", run),
    ("export {folder}/run {folder}/pairs", "pairs", run),
    # The comparison of the estimates.
    ("estimates --only E1,E9", "--only"),
    ("estimates --json /no/such/x.json", "/no/such/x.json"),
    ("estimates --sm 8.9", "--sm"),
    ("estimates --preset dem", "--preset"),
    ("estimates --only E1 --M 2", "--M"),
    ("estimates --only E4 --N 195", "--N"),
    ("estimates --only E4 --H 100", "--H"),
]
