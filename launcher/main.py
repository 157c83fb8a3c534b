"""`python launcher/main.py` and `accelerate launch launcher/main.py`: a checkout runs without being installed."""

import sys
from pathlib import Path


def import_from_root(folder: Path) -> None:
    """Put the repository root first on sys.path, and remove this file's own folder.

    Python puts a script's folder first: `import launcher` would fail, and a module of ours could hide a package of the
    same name.
    """
    sys.path[:] = [str(folder.parent), *(entry for entry in sys.path if Path(entry).resolve() != folder)]


if __name__ == "__main__":
    import_from_root(Path(__file__).resolve().parent)

    from launcher.__main__ import start

    sys.exit(start())
