"""Every fault, in processes of its own; the table of what came of them is in the summary."""

import pytest

from survival import faults, places


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return places.prepare(tmp_path_factory.mktemp("survival"))


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.__name__)
def test_survives(fault, place, record_property):
    """It raises at the first time that something is not as it must be."""
    found = fault(place)
    assert found.tried > 0
    record_property("survival", list(found))
