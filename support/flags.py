"""The commands' --help: common flags first, each in a line or two."""

import argparse
import shutil


class Help(argparse.HelpFormatter):
    """Defaults where they say something, short names for values, and lines as wide as the screen."""

    def __init__(self, prog):
        width = min(110, shutil.get_terminal_size((100, 24)).columns - 2)
        super().__init__(prog, max_help_position=30, width=width)

    def _get_help_string(self, action):
        silent = any(action.default is x for x in (None, False, argparse.SUPPRESS)) or action.default == [] or "default" in (action.help or "")
        return (action.help or "") + ("" if silent else " (default: %(default)s)")

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(action.type, "NAME" if action.nargs or action.type is None else "VALUE")


def make_parser(description):
    """An ArgumentParser, and a function that gives `add_argument` of a new group of flags.

    >>> parser, group = make_parser("Shows what it is told.")
    >>> flag = group("common")
    >>> _ = flag("--count", type=int, default=3, help="how many"); _ = flag("--out", help="where to")
    >>> print(parser.format_help().split("common:")[1].strip())
    --count N   how many (default: 3)
      --out NAME  where to
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=Help, usage="%(prog)s [flags]")
    return parser, lambda title: parser.add_argument_group(title).add_argument


AS_TRAINED = "as the checkpoint was trained; else "


def flags_as_trained(flag):
    """What a checkpoint notes of how it was played (setup.PLAYED): where a flag is not given, that counts."""
    flag("--temperature", type=float, help=f"of sampling and scoring; 0 is greedy ({AS_TRAINED}1)")
    flag("--max-new-tokens", type=int, help=f"per answer ({AS_TRAINED}as train.py)")
    flag("--max-context", type=int, help=f"tokens of an episode ({AS_TRAINED}as train.py)")
    flag("--show-actions", action="store_true", default=None,
         help=f"name the admissible commands in every observation ({AS_TRAINED}not)")
