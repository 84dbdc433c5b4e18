"""Results that print as tables."""

from __future__ import annotations

from abc import ABC, abstractmethod

from rich.console import Console
from rich.table import Table

#: Width of a printed table in characters.
WIDTH = 140


class Printed(ABC):
    """``print()`` shows :meth:`table`, without colours; rich shows it with them."""

    @abstractmethod
    def table(self) -> Table:
        """The result as a table."""

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        console = Console(width=WIDTH, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()
