"""What can be wrong in options, settings and DeepSpeed's JSON: see tests/test_mistakes.py."""

from tests import make


def ds_json(content: str | dict):
    content = content if isinstance(content, str) else {"zero_optimization": {"stage": 1}} | content
    return lambda here: make.json_file(here / "ds.json", content)


JSON = "train --deepspeed_config {here}/ds.json"

MISTAKES = [
    ("train --preset dmeo", "--preset"),
    ("train --stpes 3", "--stpes"),
    ("train --steps 3 --epochs 1", "optim.epochs is 1"),
    ("train --losses global,clmi", "'cmli'"),
    ("train --set student.layres=2", "'layers'"),
    ("train --set run.report_to=wadnb", "run.report_to"),
    ("train --plugin nowhere.at_all", "nowhere"),
    ("train --profile 30:31", "--profile"),
    ("train --deepspeed_config {here}/ds.json", "ds.json"),
    (JSON, "ds.json", ds_json('{"fp16": ')),
    (JSON, "'zero_optimization'", ds_json({"zero_optimisation": {}})),
    (JSON, "hybrid_engine", ds_json({"hybrid_engine": {"enabled": True}, "pipeline": False})),
    (f"train --preset {'x' * 5000}", "(5002 characters): known: demo, "),
    (f"train --steps {'x' * 5000}", "--steps"),
    (f"train --data {'x' * 5000}", "--data"),
    (JSON, "train_batch_size", ds_json({"train_batch_size": 9, "train_micro_batch_size_per_gpu": 2})),
]
