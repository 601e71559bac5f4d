import pytest

from tests.data.sources.samples import build, picture, shown
from tests.data.sources.test_folder import names, user_error


def write(folder, text, count=4, name="pairs.csv"):
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
    source = train(write(tmp_path, table(separator, columns)))
    assert names(source) == ["0.png", "1.png", "2.png", "3.png"]
    assert source.captions(1) == ["red apple 1", "green pear"]
    assert source.image(3) == picture(3)


def test_columns_and_separator_may_be_given(tmp_path):
    text = "a;filepath;b;title\n" + "".join(f"x;{k}.png;other;mine {k}\n" for k in range(4))
    path = write(tmp_path, text)
    found = train(path, separator=";", caption_key="b")
    assert found.captions(0) == ["other"]
    assert train(path, separator=";").captions(0) == ["mine 0"]
    assert train(write(tmp_path, table()), separator="\\t").captions(0) == ["red apple 0"]
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
    ],
)
def test_mistakes_are_one_line(tmp_path, text, said):
    assert said in user_error(build, write(tmp_path, text))


def test_images_are_found_beside_the_list_above_it_or_where_the_user_says(tmp_path):
    write(tmp_path / "images", "")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "x.csv").write_text(table())
    assert train(tmp_path / "lists" / "x.csv").image(1) == picture(1)
    write(tmp_path / "far", "")
    (tmp_path / "x.csv").write_text(table())
    assert train(tmp_path / "x.csv", image_root=str(tmp_path / "far")).image(1) == picture(1)
    absolute = table().replace("\n", f"\n{tmp_path}/far/", 5)
    (tmp_path / "y.csv").write_text(absolute)
    assert train(tmp_path / "y.csv").image(1) == picture(1)
    assert shown(build(tmp_path / "y.csv", val_source=str(tmp_path / "y.csv")).train[2]) == 2


def test_a_path_out_of_the_images_folder_is_a_bad_sample(tmp_path):
    path = write(tmp_path / "data", table())
    (tmp_path / "secret.png").write_bytes(picture(7))
    with open(path, "a") as file:
        file.write("../secret.png\tx\n")
    data = build(path, val_source=str(path), max_bad_share=0.5)
    assert data.train[4].bad[0] == "../secret.png" and "symlink out of the data folder" in data.train[4].bad[1]
