"""Options as a command gets them."""


def options(**given):
    return {name: None for name in ("losses", "data", "workers", "steps", "epochs", "micro_batch", "lr", "seed")} | {
        "deterministic": None,
        "preset": "tiny",
        "init": "preset",
        **given,
    }
