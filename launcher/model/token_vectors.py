"""The vectors of single tokens in embedding and output head. LoRA on the layers' projections never changes them.

A base model often has control tokens that it was never trained on, among them those that a chat template ends turns
with. Their vectors are zero, equal to those of other unused tokens, or the mean of all (where a resize added them).
LoRA changes the hidden state h that the head multiplies, so a token can be learned only if its vector v is its own:

    v is zero               its logit v·h is 0 for every h
    v equals another's      both always have the same logit: none of n such tokens gets a probability above 1/n
    v is the mean           its logit is always the mean of all logits

Two vectors count as equal up to a distance of NEAR. In the shipped base, whose training data is known, the 170 tokens
that never occurred are 0.10 to 0.13 from their nearest; of those that occurred, none is nearer than 0.54. After 120
steps on one question its probability of ending the answer was 1.00 with a trained end token, 0.79 with one at 0.11,
0.03 at 0.03, and 0.0002 with the mean (1.00 again at 0.25; 0.75
with a vector scaled by 0.05): what is nearly equal is learned badly, what is equal never.

V  vectors    D  model width    N  some tokens
"""

import os
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor

from launcher.errors import RecipeError
from launcher.model.weight_files import EMBEDDING, HEAD
from launcher.recipe.schema import ModelSection

NEAR = 0.2  # distance of two vectors, as a share of the longer one's norm
FAINT = 0.05  # norm, as a share of the usual one; a shorter vector counts as nearly zero
VANISHING = 1e-3  # the same of embeddings, which the first norm scales up unless they vanish
RUNS, RUN = 16, 256  # so many runs of so many vectors stand for all
MAX_UNUSED = 512  # unused control tokens that are compared with
MAX_TOKENS_NAMED = 4  # tokens in a note
UNTRAINED_REMEDY = (
    "Train it too (lora.trainable_tokens), or use the instruct model, or a chat template whose control tokens are "
    "trained"
)


def check_pad_id(config: Any) -> None:
    """Raise RecipeError for a pad id of the config without a vector: transformers cannot make such a model."""
    pad_id, vocabulary = config.pad_token_id, config.vocab_size
    if pad_id is not None and not -vocabulary <= pad_id < vocabulary:  # torch counts negative ids from the end
        raise RecipeError(
            f"pad_token_id in config.json must be below vocab_size, which is {vocabulary}; it is {pad_id}.\n"
            "Set it to null there: training does not use it."
        )


def stored_vectors(source: str, config: Any, model: ModelSection) -> tuple[Tensor, Tensor] | None:
    """Embedding and head [V, D] of a checkpoint, memory-mapped: only what is used of them is read. None for random
    weights, and for files that are not on this disk or cannot be read."""
    if model.init == "random":
        return None
    if not os.path.isdir(source):
        cached = try_to_load_from_cache(source, "config.json", revision=model.revision)
        source = os.path.dirname(cached) if isinstance(cached, str) else ""
    vectors: dict[str, Tensor] = {}
    try:
        for file in Path(source).glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                vectors |= {name: tensors.get_tensor(name) for name in {EMBEDDING, HEAD} & set(tensors.keys())}
        if config.tie_word_embeddings and len(vectors) == 1:  # of both, transformers ties only what is equal
            vectors = dict.fromkeys((EMBEDDING, HEAD), *vectors.values())
        return vectors[EMBEDDING], vectors[HEAD]
    except (SafetensorError, OSError, KeyError):
        return None


def untrained_notes(
    embedding: Tensor, head: Tensor, tokenizer: Any, *, read: Set[int], written: Set[int]
) -> tuple[str, ...]:
    """Warnings about control tokens that the model cannot learn to write, or cannot tell apart when it reads them.

    embedding, head [V, D]. `read`: ids of the data; `written`: those of them that are targets.
    """
    added, vocabulary = set(tokenizer.added_tokens_decoder) if read else set(), min(len(embedding), len(head))
    control = sorted(index for index in added & read if index < vocabulary)
    if not control:
        return ()
    unused = sorted(index for index in added.union(range(len(tokenizer), vocabulary)) - read if index < vocabulary)
    others, eos = [*control, *unused[:: 1 + len(unused) // MAX_UNUSED]], tokenizer.eos_token_id
    reasons = _reasons(head, sorted(written & set(control) | {eos} & set(others)), others)
    notes = []
    if untrained := [f"{_name(tokenizer, index)} ({reasons[index]})" for index in reasons if index in written]:
        such_as = f", such as {tokenizer.eos_token}" if eos in others and eos not in reasons else ""
        notes.append(
            f"the output head was never trained for {_listed(untrained)}, and LoRA does not train it: the model learns "
            f"badly or not at all to write this, and to end an answer with it. {UNTRAINED_REMEDY}{such_as}."
        )
    if alike := [_name(tokenizer, index) for index in _alike(embedding, control)]:
        notes.append(
            f"the embedding was never trained for {_listed(alike)}, and LoRA does not train it: the model reads them "
            f"as the same token. {UNTRAINED_REMEDY}."
        )
    return tuple(notes)


def _reasons(vectors: Tensor, indices: Sequence[int], others: Sequence[int]) -> dict[int, str]:
    """Those of the indices whose vector is not their own, each with what it is instead.

    Compared with `others` and with runs of vectors from all over the vocabulary. vectors [V, D].
    """
    starts = range(0, len(vectors), max(RUN, len(vectors) // RUNS))
    runs = [vectors[start : start + RUN].cpu().float() for start in starts]
    ids = [index for start, run in zip(starts, runs, strict=True) for index in range(start, start + len(run))]
    sample = torch.cat(runs)
    all_ids, known = torch.tensor([*ids, *others]), torch.cat([sample, _taken(vectors, others)])  # [N], [N, D]
    usual, mean = sample.norm(dim=1).median(), sample.mean(dim=0)
    reasons = {}
    for index, vector in zip(indices, _taken(vectors, indices), strict=True):
        same = _near(vector, known) & (all_ids != index)
        if vector.norm() <= FAINT * usual:
            reasons[index] = "nearly zero" if vector.any() else "zero"
        elif _near(vector, mean[None]).any():
            reasons[index] = "the mean of all tokens"
        elif same.any():
            reasons[index] = f"nearly equal to at least {len(all_ids[same].unique())} others"
    return reasons


def _alike(vectors: Tensor, indices: Sequence[int]) -> list[int]:
    """Those of the indices whose vector is equal to that of another of them."""
    taken = _taken(vectors, indices)
    norms = taken.norm(dim=1)
    taken[norms <= VANISHING * norms.max()] = 0  # base models have 1e-23 where others have 0
    return [index for index, vector in zip(indices, taken, strict=True) if _near(vector, taken).sum() > 1]


def _near(vector: Tensor, others: Tensor) -> Tensor:
    """Which of others [N, D] count as equal to vector [D], bool [N]."""
    return (others - vector).norm(dim=1) <= NEAR * torch.maximum(others.norm(dim=1), vector.norm())


def _taken(vectors: Tensor, indices: Sequence[int]) -> Tensor:
    """[N, D] fp32 on the CPU."""
    return vectors[torch.tensor(indices, dtype=torch.long, device=vectors.device)].cpu().float()


def _name(tokenizer: Any, index: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(index))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_TOKENS_NAMED]) + (
        f" and {len(names) - MAX_TOKENS_NAMED} more" if len(names) > MAX_TOKENS_NAMED else ""
    )
