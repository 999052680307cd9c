"""Tables in REPRODUCIBILITY.md that long tests write: between two marks, from a file under results/."""

from moe_study import store
from moe_study.data import ROOT

PAGE = ROOT / "REPRODUCIBILITY.md"


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin, written by `make {name}` -->\n", f"<!-- {name}: end -->\n"


def shown(name: str) -> str:
    """What the page holds between the marks of that name."""
    begin, end = marks(name)
    return PAGE.read_text().split(begin)[1].split(end)[0]


def show(name: str, lines: str) -> None:
    begin, end = marks(name)
    head, rest = PAGE.read_text().split(begin)
    store.write_bytes(PAGE, (head + begin + lines + end + rest.split(end)[1]).encode())
