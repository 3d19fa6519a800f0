"""How far a stage is: a bar on a terminal, a line now and then elsewhere.

The share of time in decoding is that in which the explaining stood still because no batch was decoded yet: what more processes for
decoding, or faster disks, could win.
"""

from __future__ import annotations

import time
from types import TracebackType

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_EVERY = 30.0  # seconds between lines


class Explained:
    """Tells of images explained, on stderr.

    Parameters
    ----------
    total, done
        How many images there are, and how many of them were explained by earlier runs.
    console
        Where to tell it.
    every
        Seconds between lines, where it is no terminal.
    """

    def __init__(self, total: int, done: int, console: Console | None = None, every: float = _EVERY) -> None:
        self._total, self._before, self._now = total, done, 0
        self._waited: float | None = 0.0
        self._every = every
        self._console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("explaining"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            console=self._console,
            disable=not self._console.is_terminal,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._began = self._told = time.perf_counter()  # again when explaining begins

    def __enter__(self) -> Explained:
        self._bar.start()
        self._task = self._bar.add_task("", total=self._total, completed=self._before, said="compiling")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self) -> None:
        """Start the clock: compiling is over."""
        self._began = self._told = time.perf_counter()

    def advance(self, images: int, waited: float | None) -> None:
        """Count images, for which the explaining waited so many seconds; None: not known."""
        self._now += images
        self._waited = None if waited is None or self._waited is None else self._waited + waited
        self._bar.update(self._task, advance=images, said=self.speed())
        now = time.perf_counter()
        if not self._console.is_terminal and now - self._told >= self._every:
            self._told = now
            count = self._before + self._now
            click.echo(f"explained {count:,} of {self._total:,} ({count / self._total:.0%}): {self.speed()}", err=True)

    def warn(self, message: str) -> None:
        """Say something above the bar."""
        if self._console.is_terminal:
            self._console.print(f"lrpfast: {message}", markup=False, highlight=False, soft_wrap=True)
        else:
            click.echo(f"lrpfast: {message}", err=True)

    def speed(self) -> str:
        """Say images a second, the share of time in decoding, and the time that is left."""
        seconds = time.perf_counter() - self._began
        if not self._now or seconds <= 0:
            return ""
        rate = self._now / seconds
        parts = [f"{rate:.3g} images/s" if rate < 100 else f"{rate:,.0f} images/s"]
        if self._waited is not None:
            parts.append(f"decoding {min(1.0, self._waited / seconds):.0%} of the time")
        parts.append(f"{duration((self._total - self._before - self._now) / rate)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """Say a time as a person would: 12 s, 4 min, 2 h 5 min, 3 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
