"""No total and no file is above its limit, and the mutants are of the package as it is."""

from pathlib import Path

from tests import house
from tests.mutations import MUTANTS, ROOT, mutated


def test_no_total_and_no_file_is_above_its_limit():
    assert house.violations(house.count_lines()) == []


def test_a_long_file_and_a_large_total_are_named():
    lines = {Path("ds_cmli/data/long.py"): 501, Path("docs/long.md"): 900}
    lines |= {Path(f"tests/test_{number}.py"): 500 for number in range(26)}
    assert house.violations(lines) == [
        f"tests: 13000 lines, at most {house.MAX_LINES['tests']}",
        "ds_cmli/data/long.py: 501 lines, at most 500",
    ]


def test_each_mutant_has_one_place_and_a_killer():
    for mutant in MUTANTS:
        assert mutated(mutant) != (ROOT / "ds_cmli" / mutant.file).read_text()
        file, _, function = mutant.killer.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), mutant.name
