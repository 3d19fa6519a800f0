"""`lrpfast plan`."""

from __future__ import annotations

import click

from lrpfast.cli import setup
from lrpfast.cli.options import EngineOptions, ModelOptions


def run(model: ModelOptions, engine: EngineOptions) -> None:
    """Print the plan of the model. Raises as `setup.load` and `setup.make_explainer`."""
    explainer, _ = setup.make_explainer(setup.load(model), engine)
    click.echo(str(explainer.plan()))
