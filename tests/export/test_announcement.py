"""After a bare `import ds_cmli` transformers loads exported models, and nothing is imported that is not asked for."""

import subprocess
import sys

from tests.conftest import ROOT, clean_environment
from tests.processes import finished

OTHER = """
from transformers import BertConfig
sizes = {"vocab_size": 10, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "num_hidden_layers": 1}
other = AutoModel.from_config(BertConfig(**sizes))
print("ds_cmli.export" in sys.modules, type(other).__name__)
"""
LOAD = """
folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder)
model = AutoModel.from_pretrained(folder)
inputs = processor(text="a red car")
print(type(processor).__module__, type(model).__module__, list(model.get_text_features(**inputs).pooler_output.shape))
"""
HEAVY = "print([m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])\n"


def environment():
    return clean_environment() | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def python(text, *arguments):
    command = [sys.executable, "-c", text, *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_models_load_without_trust_in_their_code(exported):
    text = "import sys, ds_cmli\n" + HEAVY + "from transformers import AutoModel, AutoProcessor\n" + OTHER + LOAD
    heavy, other, loaded = python(text, str(exported))
    assert (heavy, other) == ("[]", "False BertModel")
    assert loaded == "ds_cmli.export.processing ds_cmli.export.modeling [1, 32]"


def test_they_load_where_transformers_was_there_before(exported, tmp_path):
    text = "import sys\nfrom transformers import AutoModel\nimport ds_cmli\n"
    text += "print(type(AutoModel.from_pretrained(sys.argv[1])).__module__)"
    (tmp_path / "loads.py").write_text(text)
    done = finished([tmp_path / "loads.py", exported], environment(), ROOT, tmp_path, timeout=600)
    assert done.stdout == "ds_cmli.export.modeling\n", done.stderr
