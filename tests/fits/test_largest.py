"""The largest number with which a program fits, by bisection."""

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.fits.largest import MOST, Tried, check, largest, sentence
from tests.fits.test_fits import fits, script


def at_most(number: int):
    return lambda tried: Tried(tried <= number, tried * 10**9)


@pytest.mark.parametrize("most", [0, 1, 2, 3, 24, 31, 32, 1000])
def test_it_is_found_in_few_tries(most):
    number, tried = largest(at_most(most))
    assert number == most and most + 1 in tried and len(tried) <= 2 * (most + 1).bit_length()


def test_it_ends_where_everything_fits():
    assert largest(at_most(2 * MOST))[0] == MOST


def test_the_sentence_names_the_argument():
    number, tried = largest(at_most(5))
    said = "5 is the largest that fits on T4: it takes 5.00 GB; 6 would take 6.00 GB"
    assert sentence(number, tried, "T4", ["a.py", "--batch-size", "{}"]) == f"--batch-size {said}"
    assert sentence(number, tried, "T4", ["a.py", "batch={}"]) == f"batch {said}"
    assert sentence(number, tried, "T4", ["a.py", "{}"]) == f"the argument {said}"
    assert (
        sentence(*largest(at_most(0)), "T4", ["a.py", "{}"])
        == "not even the argument 1 fits on T4; 1 would take 1.00 GB"
    )


def test_refusals():
    for program, named, line in (
        (["a.py"], True, "finds 0"),
        (["a.py", "{}", "-b={}"], True, "finds 2"),
        (["a.py", "{}"], False, "--gpu or --limit"),
    ):
        with pytest.raises(UserError, match=line):
            check(program, named)


@pytest.mark.slow
def test_a_program_is_run_with_each(tmp_path):
    """A weight of 200 MB times the number, its gradient, and that of the second pass, beside 0.47 GB of a context."""
    program = script(
        tmp_path,
        "import sys, torch\n"
        "layer = torch.nn.Linear(50_000, 1_000 * int(sys.argv[1]), bias=False, device='cuda')\n"
        "optimizer = torch.optim.SGD(layer.parameters(), foreach=False)\n"
        "for _ in range(2): layer(torch.ones(1, 50_000, device='cuda')).sum().backward(); optimizer.step()\n",
    )
    done = fits("--fit", "--limit", "1.2GB", "--", program, "{}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = "the argument 1 is the largest that fits on 1.20 GB: it takes 1.10 GB; 2 would take 1.70 GB"
    assert done.stdout == f"{said}\n"
    done = fits("--fit", "--limit", "0.9GB", "--", program, "{}", cwd=tmp_path)
    assert (done.returncode, done.stdout.startswith("not even the argument 1 fits")) == (3, True)
    text = "raise ValueError('mine')"
    done = fits("--fit", "--gpu", "T4", "--", script(tmp_path, text), "{}", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: with 1 the program ends with code 1: ValueError: mine\n")
