"""Machines of the tests in this folder."""

import pytest

import machines


@pytest.fixture(scope="session")
def bed(tmp_path_factory):
    """Three machines with links of 1 Gbit/s; each test leaves them plugged in, and without processes."""
    reason = machines.why_not()
    if reason is not None:
        pytest.skip(reason)
    with machines.running(3, tmp_path_factory.mktemp("machines"), rate="1gbit") as found:
        yield found
