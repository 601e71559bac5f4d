"""Both towers as ONNX give the trained features for any number of images and texts, by onnxruntime."""

import pytest
import torch
from transformers import AutoModel

from ds_cmli.cmli.loss import l2_normalize
from ds_cmli.export.folder import example
from ds_cmli.export.towers import write_onnx

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@torch.no_grad()
def test_towers(exported, tmp_path):
    model = AutoModel.from_pretrained(exported)
    image, ids, mask = example(model)
    lines = write_onnx(tmp_path, model, image, ids, mask)
    files = [line.split(":")[0].rpartition("/")[2] for line in lines]
    assert files == ["image.onnx", "text.onnx", "scores.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "text.onnx")
    ids, mask = ids[[0, 1, 0], :9], mask[[0, 1, 0], :9]
    cls, tokens, valid = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    assert torch.equal(torch.from_numpy(valid), model.token_mask(ids, mask))
    wanted = model.get_text_features(ids, mask)
    torch.testing.assert_close(torch.from_numpy(cls), l2_normalize(wanted.pooler_output), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.from_numpy(tokens), l2_normalize(wanted.last_hidden_state), atol=1e-5, rtol=0)
