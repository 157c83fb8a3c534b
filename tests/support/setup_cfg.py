"""What setup.cfg says of the package."""

import configparser

from packaging.requirements import Requirement

from tests.conftest import ROOT

SETUP = configparser.ConfigParser(comment_prefixes="#")
SETUP.read(ROOT / "setup.cfg")
EXTRAS = tuple(SETUP["options.extras_require"])


def requirements(*extras: str) -> list[Requirement]:
    """What is required, and what the extras named add to it."""
    groups = [SETUP["options"]["install_requires"], *(SETUP["options.extras_require"][extra] for extra in extras)]
    return [Requirement(line) for line in "\n".join(groups).splitlines() if line]
