"""docs/clusters.md: what its files hold by the schemas of their programs, and the exit code that a scheduler sees."""

import os
import re
import signal
import subprocess
import sys

import pytest
import yaml

from ds_cmli.checkpoint.lock import JOB
from ds_cmli.faults.preemption import EXIT_CODE
from tests.conftest import ROOT, clean_environment, free_port

CLUSTERS = ROOT / "clusters"
COMMAND = "ds_cmli/train.py --deepspeed_config ds_configs/zero2.json"
RUNTIME, TRAIN_JOB = yaml.safe_load_all((CLUSTERS / "trainjob.yaml").read_text())
SKY = yaml.safe_load((CLUSTERS / "sky.yaml").read_text())


def test_kubeflows_own_models_take_the_train_job_and_its_runtime():
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install 'ds-cmli[test]'")
    for given, model in ((RUNTIME, models.TrainerV1alpha1TrainingRuntime), (TRAIN_JOB, models.TrainerV1alpha1TrainJob)):
        assert model.from_dict(given).to_dict() == given  # a key that the model does not know would be missing


def test_the_train_job_goes_on_after_85_and_ends_after_a_mistake():
    spec = RUNTIME["spec"]["template"]["spec"]
    [node] = spec["replicatedJobs"]
    job = node["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    # What Kubernetes asks for beside the types: a policy needs pods that are never restarted, and names a container.
    assert job["template"]["spec"]["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    rules = job["podFailurePolicy"]["rules"]
    assert {rule["action"] for rule in rules} == {"FailJob"}
    exits = [rule.get("onExitCodes") for rule in rules]
    assert [item and item["values"] for item in exits] == [[EXIT_CODE], None, [2]]
    assert {item["containerName"] for item in exits if item} == {container["name"]} == {node["name"]}
    ends, goes_on = spec["failurePolicy"]["rules"]
    # As pkg/controller/job/pod_failure_policy.go of Kubernetes writes the message of a Job that has failed.
    lines = ["Container node for pod a/b failed with exit code 85 matching FailJob rule at index 0",
            "Pod a/b has condition DisruptionTarget matching FailJob rule at index 1",
            "Container node for pod a/b failed with exit code 2 matching FailJob rule at index 2"]  # fmt: skip
    [pattern] = ends["onJobFailureMessagePatterns"]
    assert [bool(re.search(pattern, message)) for message in lines] == [False, False, True]
    assert (ends["action"], goes_on["action"]) == ("FailJobSet", "RestartJobSetAndIgnoreMaxRestarts")
    assert "onJobFailureMessagePatterns" not in goes_on
    options = TRAIN_JOB["spec"]["trainer"]
    assert " ".join([*options["command"], *options["args"]]).endswith(f"{COMMAND} --output-dir /runs/cmli")
    assert [variable["name"] for variable in options["env"]] == [JOB]
    assert TRAIN_JOB["spec"]["runtimeRef"]["name"] == RUNTIME["metadata"]["name"]
    grace = job["template"]["spec"]["terminationGracePeriodSeconds"]
    assert f"--shutdown-timeout={grace - 30}" in options["command"]


def test_what_is_predicted_first_has_the_ranks_that_the_files_request():
    page = (ROOT / "docs" / "clusters.md").read_text()
    trainer = TRAIN_JOB["spec"]["trainer"]
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": str(trainer["numProcPerNode"])}
    name, number = SKY["resources"]["accelerators"].split(":")
    for ranks, starts in (
        (trainer["numNodes"] * trainer["numProcPerNode"], "kubectl apply -f clusters/trainjob.yaml"),
        (SKY["num_nodes"] * int(number), "sky jobs launch --name cmli clusters/sky.yaml"),
    ):
        assert f'ds-cmli-memory --gpu "{name} 80GB" --world-size {ranks} && {starts}\n' in page


def test_skypilots_own_schemas_take_the_task():
    """With `pip install skypilot`, which is too much for the tests' own requirements."""
    schemas = pytest.importorskip("sky.utils.schemas", reason="SkyPilot is not installed")
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(SKY, schemas.get_task_schema())
    jsonschema.validate(SKY["resources"], schemas.get_resources_schema())
    jsonschema.validate(SKY["file_mounts"]["/runs"], schemas.get_storage_schema())


def test_skypilots_task_runs_the_command_and_recovers_from_85(tmp_path):
    recovery = SKY["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [EXIT_CODE] and recovery["max_restarts_on_errors"] == 3
    python = tmp_path / "ds-cmli" / "bin" / "python"  # where `setup` puts it
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$DS_CMLI_JOB" "$@"\nexit 85\n')
    python.chmod(0o755)
    env = {"SKYPILOT_TASK_ID": "sky-7", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "HOME": str(tmp_path),
           "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
           "PATH": os.environ["PATH"]}  # fmt: skip
    done = subprocess.run(["bash", "-c", SKY["run"]], env=env, capture_output=True, text=True)
    assert done.returncode == EXIT_CODE and SKY["setup"].startswith("python3 -m venv ~/ds-cmli")
    assert done.stdout.split("\n")[0] == (
        "sky-7 clusters/torchrun.py --shutdown-timeout 300 --nnodes 2 --node-rank 1 --nproc-per-node 8 "
        f"--master-addr 10.0.0.1 --master-port 29500 {COMMAND} --output-dir /runs/cmli"
    )


RANK = """
import os, sys, time
from ds_cmli.faults import preemption
if sys.argv[1] == "wait":
    preemption.install()
    print("ready", os.getpid(), flush=True)
    while not preemption.requested():
        time.sleep(0.02)
    sys.exit(85)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("asked, target, code", [("wait", "launcher", 85), ("wait", "rank", 85), ("2", "", 2)])
def test_the_exit_code_is_that_of_the_ranks(tmp_path, asked, target, code):
    (tmp_path / "rank.py").write_text(RANK)
    env = clean_environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(CLUSTERS / "torchrun.py"), f"--master-port={free_port()}"]
    command += ["--shutdown-timeout=300", str(tmp_path / "rank.py"), asked]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        if target:
            rank = int(process.stdout.readline().split()[1])
            os.kill(process.pid if target == "launcher" else rank, signal.SIGTERM)
        assert process.wait(120) == code
