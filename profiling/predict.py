"""What a training needs, before asking for GPUs:

`python profiling/predict.py --preset paper --world-size 2`
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run by its path: not this folder, but the repository is searched first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


from ds_cmli.memory.command import main

if __name__ == "__main__":
    main()
