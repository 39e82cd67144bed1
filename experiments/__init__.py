"""Entry points, one for each family of tables and figures: ``python -m experiments.catalogue``."""
