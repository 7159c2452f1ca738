"""The command line."""

from rome_pl.cli.app import main as main
from rome_pl.cli.app import run as run
