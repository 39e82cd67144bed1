"""Comparisons with the packages of peers; they need ``pip install -e '.[parity]'`` and more.

See ``requirements-parity.txt``. Without the peers these tests are skipped.
"""
