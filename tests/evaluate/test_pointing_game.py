from ds_cmli.evaluate.pointing_game import parse_annotation, parse_sentence


def test_sentences_and_annotations_of_flickr30k_entities():
    text, phrases = parse_sentence("[/EN#1/people Two men] on [/EN#22/vehicles/other a small boat] .")
    assert text == "Two men on a small boat ."
    assert [(text[p.start : p.end], p.number) for p in phrases] == [("Two men", "1"), ("a small boat", "22")]
    size, boxes = parse_annotation(
        "<annotation><size><width>500</width><height>375</height></size>"
        "<object><name>1</name><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>50</xmax><ymax>60</ymax></bndbox></object>"
        "<object><name>1</name><name>22</name>"
        "<bndbox><xmin>7</xmin><ymin>8</ymin><xmax>9</xmax><ymax>10</ymax></bndbox></object>"
        "<object><name>9</name><scene>1</scene><nobndbox>0</nobndbox></object></annotation>"
    )
    assert size == (500, 375)
    assert boxes == {"1": [(3, 4, 50, 60), (7, 8, 9, 10)], "22": [(7, 8, 9, 10)]}
