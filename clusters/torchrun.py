"""Run torchrun, and end with the exit code of its ranks.

    python clusters/torchrun.py [options of torchrun] SCRIPT ...

torchrun itself ends with 1 whatever its ranks end with, and a scheduler could not tell a run that
has saved, and is to be started again (85), from a user's mistake (2).
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from ds_cmli.faults.preemption import EXIT_CODE


def exit_code() -> int:
    try:
        main()
    except SignalException:  # it was passed on to the ranks, which have saved
        return EXIT_CODE
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(exit_code())
