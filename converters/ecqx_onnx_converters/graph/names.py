"""Short names for new values, which no value of the graph has yet."""

from __future__ import annotations


class NameMaker:
    """Makes numbered names: `maker("q")` gives q0, q1, … past those in use.

    Attributes:
        taken: Every name in use, those that it made included.
        counters: The next number to try, by prefix.
    """

    def __init__(self, taken: set[str]) -> None:
        self.taken = taken
        self.counters: dict[str, int] = {}

    def __call__(self, prefix: str) -> str:
        """Makes a name from a prefix; it counts as taken from then on."""
        while True:
            number = self.counters.get(prefix, 0)
            self.counters[prefix] = number + 1
            name = f"{prefix}{number}"
            if name not in self.taken:
                self.taken.add(name)
                return name
