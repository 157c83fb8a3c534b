"""Loss, perplexity and token accuracy of a run's adapter, as stock code computes them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel

from launcher.data.documents import Document
from launcher.export.evaluated_data import EvaluatedData, read_evaluated
from launcher.export.generate import Answerer
from launcher.export.limits import limits_of
from launcher.export.load_run import OpenedRun, load_trained
from launcher.export.supervised import batches_by_length, check_head, supervised_logits
from launcher.model.build import DTYPES
from launcher.recipe.run_options import EvaluateOptions, GenerateOptions
from launcher.records.answers import Answered
from launcher.records.evaluation import EvaluationRecord, ModelFigures
from launcher.records.run import Phase, Verdict
from launcher.runtime.clock import Clock


def evaluation(run: OpenedRun, options: EvaluateOptions) -> Iterator[str | Phase | EvaluationRecord]:
    """Yields the names of phases and, last, the record. Raises what the data and the base raise."""
    clock, done, figures = Clock(), 0, dict[str, ModelFigures]()

    def count(documents: int) -> None:
        nonlocal done
        done = documents

    yield "reading data"
    with clock.phase("data"):
        data = read_evaluated(run, options)
    yield "loading the model"
    with clock.phase("load"):
        model, loaded = load_trained(run)
    for side in ("trained", "base") if options.base else ("trained",):
        yield Phase(f"evaluating, {side}", lambda: f"{done:,} of {len(data.documents):,} documents")
        count(0)
        with clock.phase(side), model.disable_adapter() if side == "base" else nullcontext():
            figures[side] = _figures(model, data.documents, count)
    answers = list[Answered]()
    answerer = Answerer(run, model, GenerateOptions(run=options.run, base=options.base)) if data.prompts else None
    for number, prompt in enumerate(data.prompts, 1):
        yield f"answering {number} of {len(data.prompts)}"
        with clock.phase("samples"):
            assert answerer is not None
            found = answerer.answered_or_not(prompt)
        if isinstance(found, Answered):
            answers.append(found)
        else:
            data = replace(data, notes=(*data.notes, f"samples: row {number}: {str(found).splitlines()[0]}"))
    record = _record(run, options, data, figures)
    verdicts = [*([loaded] if loaded else []), *_loss_verdict(run, data, figures["trained"].loss)]
    yield EvaluationRecord(**record, answers=tuple(answers), verdicts=tuple(verdicts), elapsed_s=clock.elapsed_s)


@torch.inference_mode()
def _figures(model: PeftModel, documents: Sequence[Document], count: Callable[[int], None]) -> ModelFigures:
    check_head(model, documents[0])
    sums, tokens, done = torch.zeros(2, dtype=torch.float64, device=model.device), 0, 0
    for batch in batches_by_length(documents):
        for logits, targets in supervised_logits(model, batch):
            losses, right = F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets
            sums += torch.stack([losses.double().sum(), right.double().sum()]).to(sums.device)
            tokens += len(targets)
        done += len(batch)
        count(done)
    loss, accuracy = (sums / tokens).tolist()
    return ModelFigures(loss, accuracy)


def _loss_verdict(run: OpenedRun, data: EvaluatedData, found: float) -> list[Verdict]:
    """Whether the loss is what the run measured for this adapter; none where it measured none on this data."""
    measured = run.place.eval_loss
    if measured is None or not data.is_the_runs:
        return []
    limit = limits_of(on="dequantised", dtypes=(run.dtype, DTYPES[run.place.dtype])).loss * max(1.0, measured)
    evidence = f"{measured:.6f} in the run, {found:.6f} here: {found - measured:+.1e}, at most {limit:.1e} apart"
    return [Verdict("the loss is what the run measured", abs(found - measured) <= limit, evidence)]


def _record(
    run: OpenedRun, options: EvaluateOptions, data: EvaluatedData, figures: dict[str, ModelFigures]
) -> dict[str, Any]:
    short = len(data.prompts) < options.samples
    few = f"samples: {len(data.prompts)} of {options.samples} rows; no more are kept that end with an answer"
    return {
        "run": str(run.place.adapter),
        "base": run.source,
        "device": "CPU" if run.device.type == "cpu" else torch.cuda.get_device_name(run.device),
        "dtype": str(run.dtype)[6:],
        "data": data.name,
        "rows": data.rows,
        "documents": len(data.documents),
        "tokens": sum(map(len, data.documents)),
        "supervised_tokens": sum(int(document.supervised[1:].sum()) for document in data.documents),
        "loss_on": data.loss_on,
        "counts": data.counts,
        "trained": figures["trained"],
        "without_adapter": figures.get("base"),
        "run_eval_loss": run.place.eval_loss if data.is_the_runs else None,
        "notes": (*run.notes, *data.notes, *([few] if short else [])),
    }
