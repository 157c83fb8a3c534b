"""Arguments of the command line."""

from collections.abc import Iterable


def replaced(arguments: Iterable[str], *others: str) -> list[str]:
    """The arguments with other values for some keys."""
    keys = {argument.split("=")[0] for argument in others}
    return [*(argument for argument in arguments if argument.split("=")[0] not in keys), *others]
