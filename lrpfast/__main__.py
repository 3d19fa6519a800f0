"""`python -m lrpfast` is the command `lrpfast`."""

from lrpfast.cli import main

if __name__ == "__main__":
    main(prog_name="lrpfast")
