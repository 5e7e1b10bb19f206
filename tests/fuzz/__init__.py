"""Hostile files for every reader: each must end in a result or in one sentence, and soon.

    python -m tests.fuzz [--seconds 30] [--seed 0] [READER ...]     or: make fuzz

A reader is a module in `readers/` with

    NAME = "npz"                        what the table and the folder of the corpus call it
    SUFFIX = ".npz"                     optional: how the inputs' names end
    make_seeds() -> list[bytes]         small valid inputs, made by script, without files of others
    read(path: Path) -> None            our real reader or command on that input
    mutate(seed: bytes, random: random.Random) -> bytes     optional; mutation.mutate by default

`read` may return, or raise an EcqxError of status 1 or 2. Everything else is a failure: another
exception, a command that ends with another status (`commands.run_command` calls one), a process
that dies, more than 30 s, more than 2 GB of resident memory. An input is always one file. A reader
of a folder takes a zip archive and unpacks it with `folders.unpack`, which can also plant links,
pipes and huge files.

To add a reader: write the module, run `python -m tests.fuzz NAME`, mend what it finds. An input
that failed lies in `found/` (not committed); once mended, move it to `corpus/NAME/` under a name
that says what it is. `tests/test_fuzz_corpus.py` reads the whole corpus again in every run of the
tests, so keep its files small and few. Mutations depend on nothing but --seed, the reader and the
input's number.
"""
