import pytest

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.sources.csv_list import load_csv
from ds_cmli.data.sources.folder import load_folder
from tests.data.sources.samples import picture
from tests.data.sources.test_folder import captions, user_error

ROWS = [("0.png", "red apple"), ("1.png", '"a cat, asleep"'), ("2.png", '"the ""big"" dog"'), ("3.png", "green pear")]


def write(folder, name, lines, end="\n"):
    for k in range(10):
        (folder / f"{k}.png").write_bytes(picture(k))
    (folder / name).write_bytes(end.join([*lines, ""]).encode())
    return folder / name


def load(path):
    config = DataConfig(source=str(path))
    if path.name == "metadata.csv":
        return load_folder(str(path.parent), [], config)
    return load_csv(str(path), [path], config)


def header(name):
    return "file_name\ttext" if name == "metadata.csv" else "filepath\ttitle"


def lines(name, rows):
    """The lines of a file: a .tsv has tabs between its cells, others commas."""
    separator = "\t" if name.endswith(".tsv") else ","
    return [line.replace("\t", separator) for line in (header(name), *("\t".join(row) for row in rows))]


NAMES = ["pairs.csv", "pairs.tsv", "metadata.csv"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", NAMES)
def test_quotes_that_belong_there_are_read(tmp_path, name, end):
    parts = load(write(tmp_path, name, lines(name, ROWS), end))
    assert captions(parts.train) == [["red apple"], ["a cat, asleep"], ['the "big" dog'], ["green pear"]]
    assert parts.notices == []


@pytest.mark.parametrize(
    ("row", "text", "said"),
    [
        (1, '"a cat, asleep', "line 3 has a quote that is closed only after line 4, or never"),
        (3, '"green pear', "line 5 has a quote that is closed only after line 5, or never"),
        (0, '"red apple" tree', "line 2 cannot be read"),
        (0, '"red apple', "line 2 has a quote that is closed only after line"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_quote_out_of_place_is_refused_with_its_line(tmp_path, name, row, text, said):
    some = list(ROWS)
    some[row] = (some[row][0], text)
    assert said in user_error(load, write(tmp_path, name, lines(name, some)))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", NAMES)
def test_a_quote_that_another_rows_end_closes_takes_in_no_rows(tmp_path, name, end):
    some = [("0.png", '"red apple'), ("1.png", "green pear"), ("2.png", 'a screen of 5"'), ("3.png", "blue car")]
    said = user_error(load, write(tmp_path, name, lines(name, some), end))
    assert "line 2 has a quote that is closed only after line 4" in said


@pytest.mark.parametrize("name", NAMES)
def test_a_quote_in_the_column_of_the_paths_takes_in_no_rows(tmp_path, name):
    some = [("0.png", "red apple"), ('"1.png', "green pear"), ('2.png"', "blue car")]
    assert "line 3 has a quote that is closed only after line 4" in user_error(
        load, write(tmp_path, name, lines(name, some))
    )


def test_a_quote_in_front_of_the_first_line_is_refused(tmp_path):
    path = write(tmp_path, "pairs.csv", ['"filepath,title', '0.png,"red apple'])
    assert "line 1 has a quote" in user_error(load, path)


def test_a_text_that_comes_first_takes_in_no_rows(tmp_path):
    path = write(tmp_path, "pairs.csv", ["title,filepath", '"red apple,0.png', "green pear,1.png", 'a 5",2.png'])
    assert "line 2 has a quote that is closed only after line 4" in user_error(load, path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", NAMES)
def test_a_text_of_several_lines_is_read_and_told(tmp_path, name, end):
    some = [("0.png", "red apple"), ("1.png", f'"a cat,{end}asleep"'), ("2.png", "dog"), ("3.png", f'"a{end}b{end}c"')]
    path = write(tmp_path, name, lines(name, some), end)
    parts = load(path)
    assert captions(parts.train)[1:] == [[f"a cat,{end}asleep"], ["dog"], [f"a{end}b{end}c"]]
    (line,) = parts.notices
    assert line.startswith(f"{path} has 2 quoted texts of several lines, the first in the lines 3 to 4")


def test_a_field_that_is_too_long_is_not_called_an_encoding(tmp_path):
    path = write(tmp_path, "pairs.csv", lines("pairs.csv", [("0.png", "red " * 40_000)]))
    said = user_error(load, path)
    assert said.endswith("line 2 has a text of more than 131,072 characters: close its quote, or shorten it")
