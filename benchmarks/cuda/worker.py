"""Takes parts, by their names on standard input, and tells each line of theirs as it is found.

`python -m benchmarks.cuda.worker SCALE DEVICE`. A part that fails ends the process: after some
errors a GPU cannot be used again, and what the part held is gone with it.
"""

from __future__ import annotations

import sys
import traceback

from benchmarks.cuda.meter import free
from benchmarks.cuda.parts import PARTS
from benchmarks.cuda.scale import FULL, TINY
from benchmarks.meter import tell
from prefloop.models.load import pick_device

SCALES = {"full": FULL, "tiny": TINY}


def main(scale: str, device: str) -> None:
    """One part after another, until there are no more names."""
    for name in sys.stdin:
        try:
            where = pick_device(device)
            for line in PARTS[name.strip()](SCALES[scale], where):
                tell(**line)
            free(where)
        except Exception as error:
            traceback.print_exc()
            tell(failed=traceback.format_exception_only(error)[-1].splitlines()[0])
            sys.exit(1)
        tell(done=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
