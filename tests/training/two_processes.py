"""All cases of two processes, in one start: what they import takes longer than most of them.

    python -m torch.distributed.run … -m tests.training.two_processes FOLDER

`tests.distributed.two_processes` starts it.
"""

import sys

from tests.distributed import process_group
from tests.training import adversarial_programs, programs


def main(folder):
    with process_group():
        adversarial_programs.run_cases(folder)
        # Last: its last cases leave one rank waiting for another.
        programs.run_cases(folder, 2, [n for n in programs.CASES if not n.startswith("three")])


if __name__ == "__main__":
    main(*sys.argv[1:])
