"""What can be wrong in an export: see tests/test_mistakes.py."""

from tests.evaluate.mistakes import run

MISTAKES = [
    ("export {here}/nowhere {here}/out", "nowhere"),
    ("export {here}/run {here}/out --as onyx", "--as", run),
    ("export {here}/run {here}/out --ema", "--ema", run),
    ("export {here}/run {here}/pairs", "pairs", run),
    ("export {here}/run {here}/out --interpolate 2", "--interpolate", run),
    ("export {here}/run {here}/out --tokenizer {here}/nowhere", "tokenizer", run),
]
