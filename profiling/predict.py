"""What a training needs, before asking for GPUs: `python profiling/predict.py --preset paper --world-size 2`"""

import sys

# Run by its path, this file's folder comes first on sys.path, where its own name would hide other modules.
sys.path[:] = [p for p in sys.path if p != __file__.rsplit("/", 1)[0]]

from ds_cmli.memory.command import main  # noqa: E402

if __name__ == "__main__":
    main()
