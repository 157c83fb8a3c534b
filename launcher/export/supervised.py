"""Logits of supervised tokens alone, by a stock model, in bounded memory.

Letters: B documents of a batch, L tokens of its longest, D model width, R rows of one chunk, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from launcher.data.documents import Document
from launcher.errors import RecipeError
from launcher.model.logits import finished_logits, logits_rule

CHUNK_BYTES = 2**28  # of fp32 logits that exist at once: 512 rows of a vocabulary of 131,072
BATCH_POSITIONS = 8192  # padded positions of a batch, unless one document alone has more
NO_LOSS = -100
SAME_LOGITS = 1e-3  # relative to the largest; both are made by the same code


def supervised_logits(model: Any, documents: Sequence[Document]) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of logits fp32 [R, V] and their targets [R], document by document. One forward pass of the body for all.

    Documents are padded on the right, where no token before sees it: the causal mask is all that is needed.
    """
    ids = torch.zeros(len(documents), max(map(len, documents)), dtype=torch.long)
    targets = torch.full_like(ids, NO_LOSS)
    for row, document in enumerate(documents):
        tokens, supervised = torch.tensor(document.input_ids, dtype=torch.long), torch.tensor(document.supervised)
        ids[row, : len(tokens)] = tokens
        targets[row, : len(tokens) - 1] = tokens[1:].where(supervised[1:], NO_LOSS)  # position t predicts token t + 1
    hidden = model.get_decoder()(input_ids=ids.to(model.device), use_cache=False).last_hidden_state  # [B, L, D]
    targets = targets.to(hidden.device)
    kept, wanted, head = hidden[targets != NO_LOSS], targets[targets != NO_LOSS], model.get_output_embeddings()
    rows = max(1, CHUNK_BYTES // (4 * model.config.vocab_size))
    rule = logits_rule(model.config)
    for chunk, expected in zip(kept.split(rows), wanted.split(rows), strict=True):
        logits = finished_logits(head(chunk), rule).float()
        yield logits, expected.to(logits.device)


@torch.inference_mode()
def check_head(model: Any, document: Document) -> None:
    """Raise RecipeError unless the stock model's logits are what `supervised_logits` makes of its head's outputs: one
    that computes something else after the head would be measured wrongly."""
    ids = torch.tensor(document.input_ids, dtype=torch.long, device=model.device)[None]
    stock = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
    ours = finished_logits(model.get_output_embeddings()(hidden), logits_rule(model.config))
    difference = (ours.float() - stock).abs().max()
    if not difference <= SAME_LOGITS * stock.abs().max():
        raise RecipeError(
            f"the logits of a model must be the outputs of its head; those of {type(model).__name__} are "
            f"{float(difference):.2g} away: it computes something after the head, which this program does not know."
        )


def batches_by_length(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """All documents in batches of at most BATCH_POSITIONS, the longest first: what does not fit shows at once."""
    batch: list[Document] = []
    for document in sorted(documents, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > BATCH_POSITIONS:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch
