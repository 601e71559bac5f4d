"""After a bare `import ds_cmli` transformers loads exported models, and nothing is imported that is not asked for."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT, clean_environment

LOAD = """
folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder)
model = AutoModel.from_pretrained(folder)
inputs = processor(text="a red car")
print(type(processor).__module__, type(model).__module__, list(model.get_text_features(**inputs).pooler_output.shape))
"""
OTHERS = """
import sys, ds_cmli
from transformers import AutoConfig, AutoModel, BertConfig
other = AutoModel.from_config(BertConfig(num_hidden_layers=1))
print("ds_cmli.export" in sys.modules, type(other).__name__)
print(type(AutoModel.from_pretrained(sys.argv[1])).__name__, AutoConfig.from_pretrained(sys.argv[1]).model_type)
"""
HEAVY = "print([m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])\n"


def python(text, *arguments):
    env = clean_environment() | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", text, *arguments], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "imports",
    [
        "import ds_cmli\n" + HEAVY + "from transformers import AutoModel, AutoProcessor\n",
        "from transformers import AutoModel, AutoProcessor\nimport ds_cmli\nprint([])\n",
    ],
    ids=["before transformers", "after it"],
)
def test_models_load_without_trust_in_their_code(imports, exported):
    heavy, loaded = python("import sys\n" + imports + LOAD, str(exported))
    assert heavy == "[]"
    assert loaded == "ds_cmli.export.processing ds_cmli.export.modeling [1, 32]"


def test_a_model_alone_and_other_models_as_before(exported):
    assert python(OTHERS, str(exported)) == ["False BertModel", "CMLIModel ds_cmli"]
