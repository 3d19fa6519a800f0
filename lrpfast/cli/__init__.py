"""The command `lrpfast`.

`options` and `commands` declare what can be typed and import nothing heavy, so that `--help` and a mistyped option
answer at once. What a command does is a module of its own, imported when the command runs: `explain`, `compile`,
`plan`, `screen` (with `report` and `export-virelay`) and `info`; with `setup` for what the first four share, and `names` for the names of
results.
"""

from lrpfast.cli.commands import main

__all__ = ["main"]
