"""Entry points, one for each family of tables and figures: ``python -m experiments.catalogue``."""

import gc

# Imports and traces make hundreds of thousands of objects that stay. Python 3.11 looks for garbage
# among them after every 700 new ones, which takes a tenth of the time to the first step.
gc.set_threshold(100_000, 10, 10)
