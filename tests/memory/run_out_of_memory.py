"""A training for test_out_of_memory.py: one rank may have only so many MB beside what it has before the model is built.

python tests/memory/run_out_of_memory.py FOLDER RANK MB DEEPSPEED_JSON
"""

import json
import re
import resource
import sys
from pathlib import Path

from ds_cmli.common import silence

silence()

from ds_cmli import engine  # noqa: E402
from ds_cmli.config.deepspeed_config import DeepSpeedConfig  # noqa: E402
from ds_cmli.config.presets import load_preset  # noqa: E402
from ds_cmli.distributed import process_group as distributed  # noqa: E402
from ds_cmli.memory import out_of_memory  # noqa: E402
from ds_cmli.memory.inputs import longest_batch  # noqa: E402

OVERRIDES = {"optim": {"micro_batch": 384}, "student": {"shared_blocks": 4}}


def main(folder: str, limited: str, megabytes: str, deepspeed_json_text: str) -> None:
    device = distributed.init()
    config = load_preset("tiny", OVERRIDES)
    ds_config = DeepSpeedConfig.of(json.loads(deepspeed_json_text)).filled(config.optim, distributed.world_size(), 20)
    import deepspeed  # noqa: F401  before the limit: the libraries are not the training

    if distributed.rank() == int(limited):
        data = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
        limit = int(data) * 1024 + int(megabytes) * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    with out_of_memory.ending(Path(folder), device) as engines:
        train_engine = engine.build(config, ds_config, 1000, 20, device)
        engines.append(train_engine)
        for _ in range(2):
            train_engine.step([longest_batch(config, config.optim.micro_batch)])
    print("trained", flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
