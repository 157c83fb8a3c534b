"""After the last step: the best adapter given back; the adapter saved and proved; the sample; the run's record."""

from collections.abc import Sequence
from typing import cast

import torch

from launcher.checkpoint.adapter import TOLERANCE, save_proven
from launcher.checkpoint.bundle import best_bundle, read_bundle, step_of
from launcher.errors import CheckpointError, LauncherError
from launcher.records.run import RankRecord, RunRecord, Sample, Verdict
from launcher.runtime.ranks import broadcast, failing_together, gather
from launcher.train.describe import base_notes, rank_record, start_record
from launcher.train.evaluation import eval_loss
from launcher.train.history import RunHistory
from launcher.train.rescue import rescuing
from launcher.train.sample import generate
from launcher.train.schedule_free import evaluated_adapters
from launcher.train.setup import Worker
from launcher.train.verdicts import compile_verdicts, learning_verdict


def save_adapter_proven(worker: Worker) -> Verdict:
    """Save and prove the adapter on rank 0; every rank gets the verdict."""
    verdict = None
    with failing_together(LauncherError), rescuing(worker):
        if worker.rank_info.is_main:
            verdict = save_proven(
                worker.built.peft, worker.prepared.tokenizer, worker.folder, loss=lambda: _probe_loss(worker)
            )
    return cast(Verdict, broadcast(verdict))


def _probe_loss(worker: Worker) -> float:
    probe = worker.probe
    return float(worker.plan.call(worker.step.eval_loss, probe)) / max(1, probe.supervised_tokens)


def why_no_sample(worker: Worker) -> str:
    """Why the run has no sample; "" where it has one."""
    data = worker.prepared.data
    if not worker.recipe.run.sample_tokens:
        return "run.sample_tokens=0"
    if not data.validation_rows:
        return "no row validates (data.validation)"
    if not data.examples:
        return "no validation row is a chat that ends in an answer, with a question shorter than data.max_length"
    return ""


def make_sample(worker: Worker) -> Sample | None:
    examples, recipe = worker.prepared.data.examples, worker.recipe
    if not (worker.rank_info.is_main and examples):
        return None
    return generate(
        worker.built.packed,
        worker.prepared.tokenizer,
        examples[0],
        tokens=recipe.run.sample_tokens,
        max_length=recipe.data.max_length,
        stop_ids=worker.prepared.stop_ids,
    )


def restore_best(worker: Worker, history: RunHistory) -> Verdict:
    """Give the adapter of the best checkpoint back to every rank, and evaluate it again."""
    claim = "the adapter is the best checkpoint's"
    state = worker.state
    with worker.clock.phase("restore"):
        step = broadcast(_load_best(worker, history.eval_losses) if worker.rank_info.is_main else None)
        if isinstance(step, str):
            return Verdict(claim, False, step)
        expected = history.eval_losses[step]
        if step == state.step:
            return Verdict(claim, True, f"eval loss {expected:.6f} after step {step}, the last")
        if worker.rank_info.world_size > 1:
            for parameter in worker.step.parameters:
                torch.distributed.broadcast(parameter.data, src=0)
    found = history.restored_eval_loss = eval_loss(worker)
    same = abs(found - expected) <= TOLERANCE * max(1.0, expected)
    return Verdict(claim, same, f"eval loss {expected:.6f} after step {step} of {state.step}, {found:.6f} given back")


def _load_best(worker: Worker, eval_losses: dict[int, float]) -> int | str:
    """Write the adapter of the best checkpoint over the trained one; returns its step, or why there is none."""
    best = best_bundle(worker.folder.checkpoints, eval_losses)
    if best is None:
        return "no step that was evaluated has a checkpoint; the adapter is the last step's"
    if step_of(best) != worker.state.step:
        try:
            training = read_bundle(best)["state"]["training"]
        except (CheckpointError, OSError) as error:
            return f"{error} The adapter is the last step's."
        adapters = evaluated_adapters(training, worker.recipe.train)
        for name, tensor in worker.step.live_state()["adapters"].items():
            tensor.copy_(adapters[name])
    return step_of(best)


def _evals(history: RunHistory) -> list[float]:
    """The eval losses, that of the adapter which is saved at the end."""
    losses = [record.eval_loss for record in history.evals]
    return losses if history.restored_eval_loss is None else [*losses[:1], history.restored_eval_loss]


def _stopped(worker: Worker, history: RunHistory) -> str:
    """Why training ended before its last step; "" where it did not."""
    early_stop, patience = worker.state.early_stop, worker.recipe.train.patience
    if worker.state.step >= worker.steps or not early_stop.reached(patience):
        return ""
    best = min(history.evals, key=lambda record: record.eval_loss)
    return (
        f"early, after step {worker.state.step} of {worker.steps}: {early_stop.evals_since_best} evaluations in a row "
        f"without a lower eval loss than {best.eval_loss:.4f} after step {best.step}"
    )


def run_record(worker: Worker, history: RunHistory, verdicts: Sequence[Verdict]) -> RunRecord:
    """`verdicts`: of the adapter. The last one says whether it was saved."""
    step_s, tokens = history.steady
    ranks: tuple[RankRecord, ...] = tuple(gather(rank_record(worker, step_s=step_s, tokens=tokens)))
    compiled = (
        []
        if worker.recipe.compile.mode == "off"
        else compile_verdicts([rank.compile for rank in ranks], steps=len(history.rank_tokens))
    )
    evals = _evals(history)
    learned = None if worker.recipe.model.init == "random" else learning_verdict(history.steps, evals)
    return RunRecord(
        recipe=worker.recipe.model_dump(mode="json"),
        start=start_record(worker),
        steps=tuple(history.steps),
        evals=tuple(history.evals),
        elapsed_s=worker.clock.elapsed_s,
        ranks=ranks,
        verdicts=(*worker.built.loaded, *worker.start_verdicts, *compiled, *([learned] if learned else []), *verdicts),
        data=dict(worker.prepared.data.counts),
        stopped=_stopped(worker, history),
        notes=base_notes(worker, (history.evals or history.steps)[:1]),
        adapter=str(worker.folder.adapter) if verdicts[-1].holds and worker.recipe.model.init != "random" else None,
        eval_adapter=evals[-1] if evals else None,
        recipe_origins=dict(worker.request.origins),
    )
