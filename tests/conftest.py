import os

import pytest

# Tests run in two processes on two cores: more threads than that only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

LONG = ("tests/test_notebooks.py", "tests/distributed/", "tests/benchmarks/", "tests/cli/", "tests/train/")
"""Where single tests take long: they run first, so that at the end no process waits for another one's."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))
