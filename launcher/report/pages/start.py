"""The start panel: what is about to run, before anything slow begins."""

from launcher.records.run import StartRecord
from launcher.report.pages.formatting import counted, counts, extent, whole
from launcher.report.pages.page import Page
from launcher.report.pages.sections import model_facts, note_facts


def start_page(start: StartRecord) -> Page:
    """The recipe, the model, the device, the shapes and the data of the run that begins."""
    forecast = "" if start.forecast_mib is None else f" · peak forecast {whole(start.forecast_mib)} MiB"
    facts = [
        *model_facts(start),
        ("attention", start.attention),
        ("compile", start.compile),
        ("CUDA graphs", start.cuda_graphs),
        ("activations", start.activations + forecast),
        ("optimizer", start.optimizer),
        ("shapes", _shapes(start)),
        ("step", _step(start)),
        ("data", _data(start)),
        ("loss on", f"{counts(start.loss_on, 'row')} · {_loss_tokens(start)}template: {start.template}"),
        ("validation", counted(start.validation_rows, "row")),
        ("run folder", start.run_dir),
        *note_facts(start.notes),
    ]
    return Page(title=f"recipe {start.recipe}", facts=facts)


def _shapes(start: StartRecord) -> str:
    widths = ", ".join(map(whole, start.widths))
    shape = f"B × S = {whole(start.micro_batch)} × {widths if len(start.widths) == 1 else f'({widths})'}"
    return f"{shape} · accumulation {start.accumulation} · {counted(start.world_size, 'rank')}"


def _step(start: StartRecord) -> str:
    blocks = start.micro_batch * start.accumulation * start.world_size
    at_most = "" if len(start.widths) == 1 else "at most "
    return f"{at_most}{whole(blocks * start.widths[-1])} tokens, all ranks · {counted(start.steps, 'step')}"


def _data(start: StartRecord) -> str:
    blocks = f"{counted(start.train_blocks, 'block')}, {start.fill * 100:.1f} % filled"
    if start.streamed:
        return f"streamed, {start.batching}: {blocks}, in the first window"
    epochs = "" if start.epochs is None else f" · {start.epochs:.2f} epochs"
    return f"{counted(start.train_rows, 'row')}, {start.batching}: {blocks}{epochs}"


def _loss_tokens(start: StartRecord) -> str:
    """For how many tokens the loss is computed; nothing where for all of them."""
    tokens = [start.micro_batch * width for width in start.widths]
    if not start.loss_tokens or list(start.loss_tokens) == tokens:
        return ""
    if len(tokens) == 1:
        return f"computed for at most {whole(start.loss_tokens[0])} of {whole(tokens[0])} tokens · "
    shares = [round(100 * computed / n) for computed, n in zip(start.loss_tokens, tokens, strict=True)]
    return f"computed for at most {extent(shares)} % of the tokens · "
