"""Pages that hold their pictures, and a page that cannot be written."""

import pytest

from ds_cmli.common import documents
from ds_cmli.common.errors import UserError


def test_a_picture_in_a_page():
    assert documents.data_url(b"\x00\xff", "png") == "data:image/png;base64,AP8="


def test_a_page_is_filled_and_escaped(tmp_path):
    file = tmp_path / "page.html"
    documents.write_page(file, "--page", "ds_cmli.inference", "results.html.jinja", rows=[("a <red> car", [])])
    assert "a &lt;red&gt; car" in file.read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--page is '.*': cannot write it: Is a directory$"):
        documents.write_page(tmp_path, "--page", "ds_cmli.inference", "results.html.jinja", rows=[])
