"""What can be wrong in an evaluation, in match maps and in an export: see tests/test_mistakes.py."""

from pathlib import Path

from tests import make


def run(here: Path) -> None:
    source = make.pairs(here / "pairs", 9)
    make.write_run(here / "run", data={"source": source, "val_source": source})


def classes(here: Path) -> None:
    run(here)
    make.pictures(here / "classes", "cat/1.png", "dog/1.png")
    (here / "names.txt").write_text("one\n")
    (here / "templates.txt").write_text("a photo\n")


def empty_classes(here: Path) -> None:
    run(here)
    for name in ("cat", "dog"):
        (here / "classes" / name).mkdir(parents=True)


RUN = "evaluate --checkpoint {here}/run"

MISTAKES = [
    ("evaluate --checkpoint {here}/nowhere", "nowhere"),
    ("evaluate --checkpoint {here}", "is no run"),
    (RUN + " --data {here}/nowhere", "nowhere", run),
    (RUN + " --choices {here}/names.txt", "names.txt", classes),
    (RUN + " --ema", "--ema", run),
    (RUN + " --json {here}/nowhere/found.json", "found.json", run),
    (RUN + " --zero-shot {here}/nowhere", "--zero-shot", run),
    (RUN + " --zero-shot {here}/classes --class-names {here}/names.txt", "names.txt", classes),
    (RUN + " --zero-shot {here}/classes --templates {here}/templates.txt", "templates.txt", classes),
    (RUN + " --zero-shot {here}/pairs", "give a folder with folders of pictures", run),
    (RUN + " --boxes {here}/pairs", "give Flickr30k Entities' folder, with Annotations/", run),
    (RUN + " --data demo --split test", "the demo has its own two", run),
    (RUN + " --zero-shot {here}/classes", "its folders of classes hold no picture", empty_classes),
    (RUN + " --zero-shot ~nouser/x", "--zero-shot ~nouser/x", run),
    (RUN + " --boxes ~nouser/x", "--boxes is '~nouser/x'", run),
    ("evaluate ~nouser/x --data demo", "~nouser/x"),
    ("visualize {here}/nowhere", "nowhere"),
    ("visualize {here}/run --image {here}/pairs/0.png", "--text", run),
    ("visualize {here}/run --pairs first", "--pairs", run),
    ("export {here}/nowhere {here}/out", "nowhere"),
    ("export {here}/run {here}/out --ema", "ema", run),
    ("export {here}/run {here}/pairs", "pairs", run),
]
