import pytest

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.bad import Refused
from ds_cmli.data.sources.folder import load_folder
from ds_cmli.data.sources.tables import load_csv
from tests.data.sources.samples import build, captions, names, picture, shown, user_error

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


def write_csv(folder, text, count=4, name="pairs.csv"):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        (folder / f"{k}.png").write_bytes(picture(k))
    (folder / name).write_text(text)
    return folder / name


def table(separator="\t", columns="filepath\ttitle", count=4):
    lines = [columns, *(f"{k}.png\tred apple {k}" for k in range(count)), "1.png\tgreen pear"]
    return "\n".join(lines).replace("\t", separator) + "\n"


def train(path, **settings):
    (source,) = build(path, val_source=str(path), **settings).train.pictures.sources
    return source


@pytest.mark.parametrize("separator", ["\t", ","])
@pytest.mark.parametrize("columns", ["filepath\ttitle", "image_path\tcaption", "IMAGE\tText"])
def test_open_clips_list_is_read_with_several_captions_of_an_image(tmp_path, separator, columns):
    source = train(write_csv(tmp_path, table(separator, columns)))
    assert names(source) == ["0.png", "1.png", "2.png", "3.png"]
    assert source.captions(1) == ["red apple 1", "green pear"]
    assert source.image(3) == picture(3)


def test_columns_and_separator_may_be_given(tmp_path):
    text = "a;filepath;b;title\n" + "".join(f"x;{k}.png;other;mine {k}\n" for k in range(4))
    path = write_csv(tmp_path, text)
    result = train(path, separator=";", caption_key="b")
    assert result.captions(0) == ["other"]
    assert train(path, separator=";").captions(0) == ["mine 0"]
    assert train(write_csv(tmp_path, table()), separator="\\t").captions(0) == ["red apple 0"]
    assert "data.image_key (--csv-img-key) is 'img'" in user_error(lambda: train(path, separator=";", image_key="img"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n0.png,x\n", "has the columns a, b: say which one is meant by data.image_key"),
        ("filepath,img,title\n0.png,0.png,x\n", "has filepath and img: say which one is meant by data.image_key"),
        ("filepath,title\n0.png,a cat, asleep\n", "line 2 has 3 cells and the first line 2: quote texts with ','"),
        ("filepath,title\n", "which has no row with a caption"),
        ("filepath,title\n0.png,\n", "which has no row with a caption"),
        ("filepath,title\nnowhere.png,x\n", "names the image 'nowhere.png', which is not in"),
        ("filepath,title\n,x\n", "line 2 has the image ''"),
        ("filepath;title\n0.png;x\n", "in one column, 'filepath;title', where ',' separates columns: give another sep"),
        ("filepath|title\n0.png|a, b\n", "in one column, 'filepath|title', where ',' separates columns"),
        ("filepath\n0.png\n", "in one column, 'filepath', where ',' separates columns"),
    ],
)
def test_mistakes_are_one_line(tmp_path, text, said):
    assert said in user_error(build, write_csv(tmp_path, text))


def test_images_are_found_beside_the_list_above_it_or_where_the_user_says(tmp_path):
    write_csv(tmp_path / "images", "")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "x.csv").write_text(table())
    assert train(tmp_path / "lists" / "x.csv").image(1) == picture(1)
    write_csv(tmp_path / "far", "")
    (tmp_path / "x.csv").write_text(table())
    assert train(tmp_path / "x.csv", image_root=str(tmp_path / "far")).image(1) == picture(1)
    absolute = table().replace("\n", f"\n{tmp_path}/far/", 5)
    (tmp_path / "y.csv").write_text(absolute)
    assert train(tmp_path / "y.csv").image(1) == picture(1)
    assert shown(build(tmp_path / "y.csv", val_source=str(tmp_path / "y.csv")).train[2]) == 2


def test_a_path_out_of_the_images_folder_is_a_bad_sample(tmp_path):
    path = write_csv(tmp_path / "data", table())
    (tmp_path / "secret.png").write_bytes(picture(7))
    with open(path, "a") as file:
        file.write("../secret.png\tx\n")
    data = build(path, val_source=str(path), max_bad_share=0.5)
    assert data.train[4].bad[0] == "../secret.png" and data.train[4].bad[1].startswith("a path out of ")


def test_a_path_out_of_the_folder_is_not_called_a_symlink(tmp_path):
    for folder in ("out", "in"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.png").write_bytes(picture(3))
    (tmp_path / "in" / "link.png").symlink_to("../out/0.png")
    outside = ["../out/0.png", str(tmp_path / "out" / "0.png"), "link.png"]
    path = write_csv(tmp_path / "in", "filepath,title\n" + "".join(f"{file},a\n" for file in ["0.png", *outside]))
    source = train(path)
    reasons = []
    for index in range(1, 4):
        with pytest.raises(Refused) as error:
            source.image(index)
        reasons.append(str(error.value))
    allowed = "data.follow_symlinks=true allows it"
    assert reasons[:2] == [f"a path out of {tmp_path / 'in'}: give one in it, or {allowed}"] * 2
    assert reasons[2] == f"a symlink out of the data folder: {allowed}"
    source = train(path, follow_symlinks=True)
    assert {source.image(index) for index in range(4)} == {picture(0), picture(3)}


def test_columns_that_are_not_read_are_named(tmp_path):
    (tmp_path / "1.png").write_bytes(picture(1))
    (tmp_path / "2.png").write_bytes(picture(2))
    text = "filepath,title,wrong,negatives\n1.png,red apple,a,b\n2.png,pear,c,d\n"
    (line,) = build(write_csv(tmp_path, text)).summary
    assert line.endswith(", none left out, not read: the columns wrong, negatives")
    many = ",".join(f"c{k}" for k in range(14))
    text = f"filepath,title,{many}\n1.png,red apple{',x' * 14}\n2.png,pear{',x' * 14}\n"
    assert build(write_csv(tmp_path, text)).summary[0].endswith("c7, c8, c9, 4 more")
