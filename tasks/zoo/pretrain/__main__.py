"""`python -m mmadapters.tasks.zoo.pretrain vit|clip|blip|wav2vec2 --data FOLDER --out FOLDER`."""

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

RECIPES = {
    "vit": "photographs -> nano/vit",
    "clip": "photographs and drawn scenes -> nano/clip",
    "blip": "the same photographs and scenes, on top of nano/vit -> nano/blip",
    "wav2vec2": "synthetic US English -> nano/wav2vec2",
}


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and runs one recipe; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m mmadapters.tasks.zoo.pretrain", description=__doc__
    )
    commands = parser.add_subparsers(dest="recipe", required=True)
    for name, summary in RECIPES.items():
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.add_argument("--data", type=Path, help="folder that holds the data sets")
        command.add_argument(
            "--out", type=Path, required=True, help="folder to write the encoder to"
        )
        if name in arguments[:1]:  # import only the recipe that runs
            _recipe(name).add_arguments(command)
    options = parser.parse_args(arguments)
    _recipe(options.recipe).run(options)
    return 0


def _recipe(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


if __name__ == "__main__":
    sys.exit(main())
