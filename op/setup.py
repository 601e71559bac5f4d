"""Places the package so that no file of it is also one of the distribution ds-cmli.

pip overwrites a file that two distributions have, and removes it with either. So the package is in
a folder of its own, which a .pth file adds behind site-packages: where ds-cmli is installed, Python
finds its package, which has the same modules, and else this one.
"""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

FOLDER = "ds_cmli_op"
PACKAGE = f"{FOLDER}.ds_cmli"
PARTS = [
    f"{name}{below}" for name in ("cmli", "fits", "allocator", "common") for below in ("", ".*")
]


class BuildWithPath(build_py):
    def run(self) -> None:
        if self.editable_mode:
            raise SystemExit(
                "ds-cmli-op cannot be editable: use pip install --no-deps -e . above it"
            )
        shutil.rmtree(self.build_lib, ignore_errors=True)  # files of an earlier build
        super().run()
        (Path(self.build_lib) / f"{FOLDER}.pth").write_text(f"{FOLDER}\n")

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Leave out the trainer's modules, in the same folder as the parts."""
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if package != PACKAGE or module[1] == "__init__"]


setup(
    packages=[PACKAGE, *(f"{PACKAGE}.{part}" for part in find_packages("ds_cmli", include=PARTS))],
    package_dir={PACKAGE: "ds_cmli"},
    package_data={"": ["*.cpp", "*.h", "*.json"]},
    cmdclass={"build_py": BuildWithPath},
)
