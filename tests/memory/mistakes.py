"""What can be wrong in a prediction: see tests/test_mistakes.py."""

MISTAKES = [
    ("memory --gpu 'No Such Card'", "--gpu"),
    ("memory --gpu-memory 48GB", "--sm"),
    ("memory --gpu-memory 48GB --sm 6.1", "--sm"),
    ("memory --fit much", "--fit"),
    ("memory --world-size 0", "--world-size"),
    ("memory --json {here}/nowhere/report.json", "report.json"),
    ("memory --set student.layers=9", "student.layers"),
    ("memory --deepspeed_config {here}/ds.json", "ds.json"),
]
