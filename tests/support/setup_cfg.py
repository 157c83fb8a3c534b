"""What setup.cfg says of the package."""

import configparser

from packaging.requirements import Requirement

from tests.conftest import ROOT

SETUP = configparser.ConfigParser(comment_prefixes="#")
SETUP.read(ROOT / "setup.cfg")


def requirements() -> list[Requirement]:
    """All that is required, extras included."""
    groups = [SETUP["options"]["install_requires"], *SETUP["options.extras_require"].values()]
    return [Requirement(line) for line in "\n".join(groups).splitlines() if line]
