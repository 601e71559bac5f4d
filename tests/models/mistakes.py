"""What can be wrong in models and their weights: see tests/test_mistakes.py."""

import torch
from safetensors.torch import save_file

HEADS = """'{{"embed_dim": 33, "depth": 2, "num_heads": 2, "patch_size": 14}}'"""

MISTAKES = [
    ("train --set student.layers=9", "student.layers"),
    ("train --set student.freeze_image=9", "student.freeze_image"),
    ("train --set teacher.block=5", "teacher.block"),
    ("train --set student.image_model=vit_tinny", "student.image_"),
    ("train --set teacher.model=resnet18 --set teacher.overrides={{}}", "resnet18"),
    ("train --set data.image_size=57", "57"),
    ("train --set student.image_overrides=" + HEADS, "student.image_"),
    ("train --set teacher.weights={here}/nowhere.pt", "nowhere.pt"),
    (
        "train --set student.image_weights={here}/w.safetensors",
        "w.safetensors",
        lambda here: save_file({"cls_token": torch.zeros(1, 1, 7)}, here / "w.safetensors"),
    ),
    ("train --set student.text_weights={here}/w.pt", "w.pt", lambda here: (here / "w.pt").write_bytes(b"no weights")),
    ("train --set student.source={here}/nowhere", "student.source"),
    ("train --set run.compile=blocks --profile-memory 2", "--profile-memory"),
]
