"""Pages that hold their pictures."""

from ds_cmli.common import documents


def test_a_picture_in_a_page():
    assert documents.data_url(b"\x00\xff", "png") == "data:image/png;base64,AP8="
