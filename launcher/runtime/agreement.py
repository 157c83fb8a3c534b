"""What every rank must have alike and nobody sends: made sure of once, by comparing digests."""

import hashlib

from torch import nn

from launcher.errors import LauncherError
from launcher.runtime.ranks import gather


def check_alike(what: str, digest: str, *, error: type[LauncherError], remedy: str) -> None:
    """Every rank calls this with its own digest. Raises `error`, on all of them, where two differ.

    `what` completes "every rank must ...".
    """
    digests = gather(digest[:16])
    if len(set(digests)) > 1:
        rows = "\n".join(f"rank {rank}: {found}" for rank, found in enumerate(digests))
        raise error(f"every rank must {what}; they differ:\n{rows}\n{remedy}")


def digest_of(model: nn.Module) -> str:
    """Of the trained parameters of `model`: names and bits."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
