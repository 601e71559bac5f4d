"""The line of the user's code that runs now."""

import os
import runpy
import sys
import sysconfig
from functools import cache
from types import FrameType

import torch

INSTALLED = {"site-packages", "dist-packages"}  # this environment's, the user's or another's
GENERATED = "ds-cmli-inductor-"  # what the name of a folder of generated code begins with
OURS = os.path.dirname(os.path.realpath(__file__)) + os.sep
TORCH = os.path.dirname(os.path.realpath(torch.__file__)) + os.sep  # wherever it is installed
# Folders of libraries: what lies elsewhere is the user's own.
LIBRARIES = (
    OURS,
    TORCH,
    *(os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib")),
)
# Which call operators, and modes of dispatch, by Python.
DISPATCH = tuple(os.path.join(TORCH, name) for name in ("_ops.py", "_compile.py", "_dynamo/"))


@cache
def is_users(filename: str) -> bool:
    if filename.startswith("<") or GENERATED in filename:
        return False
    path = os.path.realpath(filename)
    return not path.startswith(LIBRARIES) and INSTALLED.isdisjoint(path.split(os.sep))


def current() -> str:
    """The innermost line of the user's code as "FILE:LINE"; "" if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != runpy.__file__:  # which runs it
        if is_users(frame.f_code.co_filename):
            return f"{os.path.relpath(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def is_autograds() -> bool:
    """Whether the operator that is dispatched now comes from autograd, not from a function."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _dispatches(frame.f_code.co_filename, frame.f_code.co_name):
        frame = frame.f_back
    return frame is None or frame.f_code.co_name == "_engine_run_backward"


@cache
def _dispatches(filename: str, function: str) -> bool:
    path = os.path.realpath(filename)
    return function == "__torch_dispatch__" or path.startswith((OURS, *DISPATCH))
