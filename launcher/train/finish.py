"""After the last step: the adapter saved and proved, the sample, and the record of the whole run."""

from typing import cast

from launcher.checkpoint.adapter import save_proven
from launcher.records.run import RankRecord, RunRecord, Sample, Verdict
from launcher.runtime.ranks import broadcast, gather
from launcher.train.describe import base_notes, rank_record, start_record
from launcher.train.history import RunHistory
from launcher.train.sample import generate
from launcher.train.setup import Worker
from launcher.train.verdicts import compile_verdicts


def save_adapter_proven(worker: Worker) -> Verdict:
    """Save and prove the adapter on rank 0; every rank gets the verdict."""
    verdict = None
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
    if data.example is None:
        return "no validation row is a chat that ends in an answer, with a question shorter than data.max_length"
    return ""


def make_sample(worker: Worker) -> Sample | None:
    example, recipe = worker.prepared.data.example, worker.recipe
    if not (worker.rank_info.is_main and example):
        return None
    return generate(
        worker.built.packed,
        worker.prepared.tokenizer,
        example,
        tokens=recipe.run.sample_tokens,
        max_length=recipe.data.max_length,
    )


def run_record(worker: Worker, history: RunHistory, saved: Verdict) -> RunRecord:
    step_s, tokens = history.steady
    ranks: tuple[RankRecord, ...] = tuple(gather(rank_record(worker, step_s=step_s, tokens=tokens)))
    compiled = (
        []
        if worker.recipe.compile.mode == "off"
        else compile_verdicts([rank.compile for rank in ranks], steps=len(history.rank_tokens))
    )
    return RunRecord(
        recipe=worker.recipe.model_dump(mode="json"),
        start=start_record(worker),
        steps=tuple(history.steps),
        evals=tuple(history.evals),
        elapsed_s=worker.clock.elapsed_s,
        ranks=ranks,
        verdicts=(*worker.built.loaded, *compiled, saved),
        data=dict(worker.prepared.data.counts),
        notes=base_notes(worker, (history.evals or history.steps)[:1]),
        adapter=str(worker.folder.adapter) if saved.holds and worker.recipe.model.init != "random" else None,
    )
