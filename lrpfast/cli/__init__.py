"""The command `lrpfast`.

`options` and `commands` declare what can be typed and import nothing heavy, so that `--help` and a mistyped option
answer at once. What a command does is a module of its own, imported when the command runs: `explain`, `compile`,
`plan` and `info`; with `setup` for what the first three share, and `names` for the names of results.
"""

from lrpfast.cli.commands import main

__all__ = ["main"]
