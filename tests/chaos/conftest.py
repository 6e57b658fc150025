"""The table that a run of the fault tests ends with: what was injected, and what it cost."""

from collections.abc import Callable

import pytest

Record = Callable[..., None]
TABLE = pytest.StashKey[list[tuple[str, ...]]]()
COLUMNS = ("fault", "injected", "rows", "lost", "doubled", "waste")


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Record:
    """record(fault, injected=, rows=, lost=, doubled=, waste=): a line of the table.

    rows: judged by the checker, in all outputs together; waste: rows generated / rows of the input, if counted.
    """
    table = pytestconfig.stash.setdefault(TABLE, [])

    def add(fault: str, *, injected: int, rows: int, lost: int, doubled: int, waste: float | None = None) -> None:
        shown = "" if waste is None else f"{waste:.3f}"
        table.append((fault, str(injected), str(rows), str(lost), str(doubled), shown))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = [COLUMNS, *config.stash.get(TABLE, [])]
    if len(lines) > 1:
        widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
        lines.insert(1, tuple("-" * width for width in widths))
        terminalreporter.section("faults")
        for line in lines:
            cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            terminalreporter.write_line(f"| {' | '.join(cells)} |")
