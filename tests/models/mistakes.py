"""What can be wrong in models and their weights: see tests/test_mistakes.py."""

MISTAKES = [
    ("train --set student.freeze_image=9", "student.freeze_image"),
    ("train --set teacher.block=5", "teacher.block"),
    ("train --set teacher.model=resnet18 --set teacher.overrides={{}}", "resnet18"),
    ("train --set teacher.weights={here}/nowhere.pt", "nowhere.pt"),
    ("train --set student.text_weights={here}/w.pt", "w.pt", lambda here: (here / "w.pt").write_bytes(b"no weights")),
    ("train --start-from ~nouser/clip", "'~nouser/clip': no such file or folder"),
    ("evaluate ~nouser/clip", "'~nouser/clip'"),
    ("train --set run.compile=blocks --profile-memory 2", "--profile-memory"),
]
