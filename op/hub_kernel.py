"""Writes the all-pairs op as a kernel of the Hugging Face Hub: `python op/hub_kernel.py FOLDER`.

The folder is what `kernels.get_local_kernel` loads, and what a kernel repository of the Hub holds.
The format allows several versions of a kernel in a process: imports are relative, and the names of
PyTorch's operators are those of the version.
"""

import argparse
import ast
import base64
import hashlib
import json
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent / "ds_cmli"
NAME = "ds-cmli-op"
# Those of the capabilities for which the Triton kernels are compiled; others run plain PyTorch.
BACKENDS = {"cpu": None, "cuda": ["8.0+PTX"]}
INIT = "from .cmli import *\nfrom .cmli import __all__\n"


def modules_of(start: Path) -> set[Path]:
    """Follow imports from a file of the package, those inside functions too; with its packages."""
    files: set[Path] = set()
    waiting = [start]
    while waiting:
        file = waiting.pop()
        if file in files:
            continue
        files.add(file)
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
                "ds_cmli."
            ):
                continue
            _, *parts = str(node.module).split(".")
            module = PACKAGE.joinpath(*parts)
            names = [module, *module.parents, *(module / alias.name for alias in node.names)]
            for name in names:
                if name.is_relative_to(PACKAGE) and name != PACKAGE:
                    places = (name.with_suffix(".py"), name / "__init__.py")
                    waiting += [place for place in places if place.is_file()]
    return files


def sources() -> dict[str, str]:
    """The text of each file by its path in the kernel, with what the code reads beside itself."""
    files = modules_of(PACKAGE / "cmli" / "__init__.py")
    for folder in {file.parent for file in files}:
        files |= {file for file in folder.iterdir() if file.suffix in (".cpp", ".h", ".json")}
    return {str(file.relative_to(PACKAGE)): file.read_text() for file in sorted(files)}


def moved(path: str, text: str, identifier: str) -> str:
    """The text of a module whose imports are relative and whose operators are `identifier`'s."""
    up = "." * len(Path(path).parts)
    for before, after in (
        ("from ds_cmli.", f"from {up}"),
        ('"ds_cmli::', f'"{identifier}::'),
        ("torch.ops.ds_cmli.", f"torch.ops.{identifier}."),
    ):
        text = text.replace(before, after)
    return text


def write(folder: Path) -> None:
    """Write `build/torch-cpu` and `build/torch-cuda`: their operators differ in names."""
    texts = sources()
    version = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:8]
    for backend, archs in BACKENDS.items():
        identifier = f"_{NAME.replace('-', '_')}_{backend}_{version}"
        contents = {"__init__.py": INIT}
        contents |= {path: moved(path, text, identifier) for path, text in texts.items()}
        variant = folder / "build" / f"torch-{backend}"
        digests = {}
        for path, text in contents.items():
            file = variant / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            digests[path] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        metadata = {
            "name": NAME,
            "id": identifier,
            "version": 0,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend} | ({"archs": archs} if archs else {}),
            "digest": {"algorithm": "sha256", "files": digests},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the op as a kernel of the Hub.")
    parser.add_argument("folder", type=Path, help="is made")
    target = parser.parse_args().folder
    if target.exists():
        parser.error(f"{target} is there: name a folder that is not")
    write(target)
