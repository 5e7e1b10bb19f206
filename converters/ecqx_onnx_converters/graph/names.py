"""Short names for new values, which no value of the graph has yet."""

from __future__ import annotations


class NameMaker:
    """`maker("q")` gives q0, q1, … past those in use."""

    def __init__(self, taken: set[str]) -> None:
        self.taken = taken
        self.counters: dict[str, int] = {}

    def __call__(self, prefix: str) -> str:
        while True:
            number = self.counters.get(prefix, 0)
            self.counters[prefix] = number + 1
            name = f"{prefix}{number}"
            if name not in self.taken:
                self.taken.add(name)
                return name
