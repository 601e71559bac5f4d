"""What can be wrong in the comparison of the estimates: see tests/test_mistakes.py."""

MISTAKES = [
    ("estimates --only E1,E9", "--only"),
    ("estimates --json /no/such/x.json", "/no/such/x.json"),
    ("estimates --sm 8.9", "--sm"),
    ("estimates --preset dem", "--preset"),
    ("estimates --only E1 --B 0", "--B"),
    ("estimates --only E1 --M 2", "--M"),
    ("estimates --only E4 --N 195", "--N"),
    ("estimates --only E4 --H 100", "--H"),
]
