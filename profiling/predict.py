"""Predict what a training needs, before asking for GPUs:

`python profiling/predict.py --preset paper --world-size 2`
"""

if __name__ == "__main__" and not __package__:  # run by its path
    import by_path  # noqa: F401

from ds_cmli.memory.command import main

if __name__ == "__main__":
    main()
