"""What can be wrong in options, settings and DeepSpeed's JSON: see tests/test_mistakes.py."""

from tests import make

JSON = "train --deepspeed_config {here}/ds.json"


def ds_json(content: str | dict):
    content = content if isinstance(content, str) else {"zero_optimization": {"stage": 1}} | content
    return lambda here: make.json_file(here / "ds.json", content)


MISTAKES = [
    ("train --preset dmeo", "run.preset is 'dmeo': did you mean 'demo'?"),
    ("train --stpes 3", "--stpes"),
    ("train --steps 3 --epochs 1", "optim.epochs is 1"),
    ("train --lr -1", "optim.lr is -1.0: Input should be greater than 0"),
    ("train --losses global,clmi", "did you mean 'cmli'?"),
    ("train --losses cmli=big", "--losses is 'cmli=big': write NAME or NAME=WEIGHT"),
    ("train --start-from ~nouser/x", "student.source is '~nouser/x'"),
    (
        "train --losses target_cmli --set loss.target_image_weight=0 --set loss.target_text_weight=0",
        "loss.target_image_weight is 0",
    ),
    ("train --set student.layres=2", "setting of student is 'layres': did you mean 'layers'?"),
    ("train --set layers=2", "--set is 'layers=2': write SECTION.SETTING=VALUE"),
    (f"train --set data.source={'[' * 5000}", "data.source"),
    ("train --set 'optim.lr_factors={{\"text\": 0.1'", "optim.lr_factors is '{\"text\": 0.1': Input should be a valid"),
    ("train --set run.report_to=wadnb", "run.report_to"),
    ("train --plugin nowhere.at_all", "nowhere"),
    ("train --profile 30:31", "--profile"),
    ("train --deepspeed_config {here}/ds.json", "ds.json"),
    (JSON, "ds.json", ds_json('{"fp16": ')),
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
    (JSON, "train_batch_size", ds_json({"train_batch_size": 9, "train_micro_batch_size_per_gpu": 2})),
]
