"""The comparison with stock code that comes before the first step (proof.start)."""

from launcher.errors import ContractError
from launcher.proof.start import POSITIONS, pieces_of, start_verdict
from launcher.runtime.ranks import failing_together
from launcher.train.setup import Worker


def is_proved(worker: Worker) -> bool:
    """Whether the run begins with it: `proof.start=auto` where the architecture has no row."""
    wanted = worker.recipe.proof.start
    return wanted == "on" or (wanted == "auto" and not worker.built.family.named)


def prove_start(worker: Worker) -> None:
    """Compare, on each rank with documents of its own; the verdict is in `worker.start_verdicts`.

    Raises ContractError on every rank where one of them computes something else than stock code."""
    recipe, info = worker.recipe, worker.rank_info
    positions = min(POSITIONS, recipe.data.max_length)
    with failing_together(ContractError):
        pieces = pieces_of(
            worker.prepared.data.first_blocks, positions=positions, rank=info.rank, ranks=info.world_size
        )
        verdict = start_verdict(worker.built, pieces, seed=recipe.train.seed)
        if not verdict.holds:
            family = worker.built.family
            raise ContractError(
                f"what trains must compute what stock code computes; of {family.model_type!r} it does not.\n"
                f"{verdict.evidence[0].upper()}{verdict.evidence[1:]}.\n"
                + ("Report it" if family.named else "Train this model with stock Transformers + PEFT")
                + " (docs/any-model.md)."
            )
    worker.start_verdicts += (verdict,)
    worker.ledger.mark("after start check")
