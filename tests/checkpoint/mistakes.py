"""What can be wrong in runs that are to go on: see tests/test_mistakes.py."""

MISTAKES = [
    ("train --resume {here}/nowhere", "nowhere"),
    ("train --output-dir {here}/file/run", "file", lambda here: (here / "file").write_text("")),
    (f"train --output-dir {{here}}/{'x' * 300}", "--output-dir"),
    ("train --output-dir ~nouser/run", "run.output_dir is '~nouser/run': Value error, there is no such user"),
]
