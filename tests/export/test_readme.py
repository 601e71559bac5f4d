"""An export's README: the names of what the model began as, without paths of this machine, and their licences."""

import pytest

from ds_cmli.config.schema import Config
from ds_cmli.export.readme import origins


def test_it_names_weights_and_data(exported):
    text = (exported / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n") and "# a model\n" in text and "'a model'" in text
    assert "the weights of its run" in text and "Twemoji" in text and len(text.splitlines()) < 30


@pytest.mark.parametrize(
    ("student", "data", "line"),
    [
        ({"image_weights": "demo"}, {}, "MIT by its package"),
        ({"image_weights": "hub"}, {}, "vit_small_patch14_dinov2, under the licence that its page"),
        ({"image_weights": "random"}, {}, "vit_small_patch14_dinov2, from random weights"),
        ({"text_weights": "/home/me/bert.safetensors"}, {}, "from bert.safetensors, under a licence not known here"),
        ({}, {"source": ["/home/me/coco.json", "/x/demo"]}, "coco.json, ./demo, under licences not known here"),
    ],
)
def test_origins(student, data, line):
    result = " ".join(origins(Config.from_dict({"student": student, "data": data})).values())
    assert line in result and "/home" not in result
