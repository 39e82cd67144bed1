"""Makes faults happen and prints what came of them: PYTHONPATH=tests python -m survival [FAULT]."""

import sys
import tempfile
import time
from pathlib import Path

from robustjax.training import report
from survival import faults


def main(names):
    chosen = [fault for fault in faults.FAULTS if not names or fault.__name__ in names]
    with tempfile.TemporaryDirectory() as folder:
        place = faults.prepare(Path(folder))
        rows = []
        for fault in chosen:
            began = time.monotonic()
            found = fault(place)
            rows.append([*map(str, found), f"{time.monotonic() - began:.1f}"])
            print(f"{found.fault}: {found.survived} of {found.tried}", flush=True)
    report.print_table(
        "Survival", ["fault", "tried", "survived", "steps lost: most, sum", "seconds"], rows
    )


if __name__ == "__main__":
    main(sys.argv[1:])
