"""Makes faults happen and prints what came of them: PYTHONPATH=tests python -m survival [FAULT]."""

import sys
import tempfile
import time
from pathlib import Path

from robustjax.training import report
from survival import faults, places


def main(names):
    chosen = [fault for fault in faults.FAULTS if not names or fault.__name__ in names]
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        place = places.prepare(Path(folder))
        rows = []
        for fault in chosen:
            began = time.monotonic()
            try:
                name, tried, lost = fault(place)
                survived = str(tried)
            except AssertionError as error:
                failed = True
                name, tried, survived, lost = fault.__name__, "", "no", ""
                print(f"{name}: {str(error)[:2000]}", flush=True)
            rows.append([name, str(tried), survived, lost, f"{time.monotonic() - began:.1f}"])
    report.print_table(
        "Survival",
        ["fault", "tried", "survived", "steps lost: at most, in all", "seconds"],
        rows,
    )
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
