"""Is what was written the model that was trained? Both are loaded by stock code, one after the other.

    trained   the NF4 base with the adapter, by transformers, bitsandbytes and PEFT; nothing of export/merge.py
    written   what the folder holds, by transformers with its own tokenizer and generation config

Weights are compared one by one: PEFT's own update on bitsandbytes' own dequantised weight, in fp32, against what the
files hold (export/weights.py). That finds a fault in a single small module, which losses hide. Losses, distributions
and greedy answers show what a user would notice, and that the files load as they should. Chats must be rendered, and
turns ended, alike.

Letters: T supervised tokens, P compared positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

from launcher.data.documents import Document
from launcher.data.pack.blocks import Blocks
from launcher.data.prepare import PreparedData
from launcher.export.load_run import OpenedRun, generation_settings
from launcher.export.supervised import check_head, supervised_logits
from launcher.model.load import stop_ids_of
from launcher.records.export import ExportFigures, ExportLimits, GreedyPair
from launcher.records.run import Verdict

DOCUMENTS = 64  # at most
PROVED_POSITIONS = 8_192  # of a document or prompt: llama.cpp's cache then takes 1 GiB for Llama 3.1 8B
LOGIT_BYTES = 2**29  # of one model's logits that are kept to be compared with the other's: decides P
PROMPTS, ANSWER_TOKENS = 4, 32
TIE = 0.25  # nats between two tokens that are equally likely in 16 bits, where logits of 16 to 32 have steps of 0.125
CHATS = (  # rendered by both tokenizers
    ["user"],
    ["user", "assistant", "user"],
    ["system", "user"],
    ["system", "user", "assistant"],
)
SAID = {"system": "Answer in French.", "user": "What is a heron?  Say it\nshortly.", "assistant": "A bird."}
HARD_TEXT = "I'LL say: don't!!\t12345 3.14  myWord==y;\r\n\n   Привет, 世界…  naïve 🙂 \n"  # each splits it otherwise
LogitsOf = Callable[[Document], Iterator[tuple[Tensor, Tensor]]]  # chunks of logits fp32 [R, V] and targets [R]


@dataclass(frozen=True)
class Probe:
    """What both models are given."""

    documents: list[Document]
    prompts: list[list[int]]
    source: str  # what the documents are, in words

    @property
    def tokens(self) -> int:
        """T."""
        return sum(int(document.supervised[1:].sum()) for document in self.documents)


@dataclass(frozen=True)
class ModelOutputs:
    """One model on a probe, on the CPU."""

    losses: Tensor  # fp32 [T]
    predictions: Tensor  # int64 [T], the likeliest tokens
    logits: Tensor  # fp32 [P, V]
    answers: list[list[int]]  # greedy, stop token included


def make_probe(data: PreparedData) -> Probe:
    """Documents of the validation data, and the beginnings of chats. Without validation data documents of training."""
    held_out = data.validation is not None
    blocks = data.validation if data.validation is not None else data.first_blocks
    documents = _documents(blocks)
    prompts = [example.prompt_ids[-PROVED_POSITIONS:] for example in data.examples[:PROMPTS]]
    if not prompts:  # texts: what comes before the first supervised token, or the first half
        prompts = [_beginning(document) for document in documents[:PROMPTS]]
    name = "validation" if held_out else "training (the run has no validation data)"
    return Probe(documents, prompts, f"{len(documents)} documents of {name}")


def _documents(blocks: Blocks) -> list[Document]:
    numbers = [n for n in dict.fromkeys(blocks.block_documents.tolist()) if blocks.documents.targets[n]]
    step = max(1, len(numbers) // DOCUMENTS)
    return [_cut(blocks.documents[number]) for number in numbers[::step][:DOCUMENTS]]


def _cut(document: Document) -> Document:
    """At most PROVED_POSITIONS of a document, its first target among them: caches and attention grow with them."""
    start = max(0, int(document.supervised[1:].argmax()) + 1 - PROVED_POSITIONS // 2)
    part = slice(start, start + PROVED_POSITIONS)
    return (
        document if len(document) <= PROVED_POSITIONS else Document(document.input_ids[part], document.supervised[part])
    )


def _beginning(document: Document) -> list[int]:
    first = int(document.supervised.argmax())
    return document.input_ids[: first or max(1, len(document) // 2)].tolist()


@torch.inference_mode()
def measured(model: Any, probe: Probe, *, stop_ids: Sequence[int]) -> ModelOutputs:
    """Losses, predictions, logits and greedy answers of a stock model."""
    check_head(model, probe.documents[0])
    answer = partial(greedy, model, stop_ids=stop_ids)
    return outputs_of(lambda document: supervised_logits(model, [document]), answer, probe, model.config.vocab_size)


def outputs_of(logits_of: LogitsOf, answer: Callable[[list[int]], list[int]], probe: Probe, width: int) -> ModelOutputs:
    """What a model gives for a probe; `width`: V."""
    losses, predictions, logits = [], [], []
    count = max(1, min(probe.tokens, LOGIT_BYTES // (4 * width)))
    kept = torch.zeros(probe.tokens, dtype=torch.bool)
    kept[torch.linspace(0, probe.tokens - 1, count).long()] = True
    for document in probe.documents:
        for found, targets in logits_of(document):
            losses.append(F.cross_entropy(found, targets, reduction="none").cpu())
            predictions.append(found.argmax(-1).cpu())
            own, kept = kept[: len(found)], kept[len(found) :]
            logits.append(found[own.to(found.device)].cpu())
    answers = [answer(prompt) for prompt in probe.prompts]
    return ModelOutputs(torch.cat(losses), torch.cat(predictions), torch.cat(logits), answers)


def greedy(model: Any, prompt: list[int], *, stop_ids: Sequence[int]) -> list[int]:
    """The next ANSWER_TOKENS tokens, up to a stop token, by stock generate with its cache."""
    settings = generation_settings(stop_ids, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    ids = torch.tensor([prompt], device=model.device)
    answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    found: list[int] = answer[0, len(prompt) :].tolist()
    return found


def figures_of(trained: ModelOutputs, written: ModelOutputs, probe: Probe) -> ExportFigures:
    largest, total, kl, apart = 0.0, 0.0, [], 0
    for p, q in zip(trained.logits.split(64), written.logits.split(64), strict=True):
        difference = (p - q).abs()
        largest, total = max(largest, float(difference.max())), total + float(difference.double().sum())
        kl.append(_kl(p.double(), q.double()))
        lost = p.amax(-1) - p.gather(-1, q.argmax(-1, keepdim=True)).squeeze(-1)
        apart += int((~(lost <= TIE)).sum())
    each = torch.cat(kl)  # [P]
    differences = (written.losses - trained.losses).double()  # [T]
    return ExportFigures(
        documents=len(probe.documents),
        tokens=probe.tokens,
        positions=len(each),
        trained_loss=float(trained.losses.double().mean()),
        written_loss=float(written.losses.double().mean()),
        largest_logit_difference=largest,
        mean_logit_difference=total / trained.logits.numel(),
        mean_kl=float(each.mean()),
        largest_kl=float(each.max()),
        disagreement=apart / len(each),
        loss_scatter=2 * float(differences.std(correction=0)) / len(differences) ** 0.5,
        agreement=float((trained.predictions == written.predictions).double().mean()),
    )


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """The divergence of the distribution q from p, both as logits [P, V]; [P]."""
    return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)


def pairs_of(trained: ModelOutputs, written: ModelOutputs, probe: Probe, run: OpenedRun) -> tuple[GreedyPair, ...]:
    decode, stops = run.tokenizer.decode, {*run.stop_ids}
    pairs = []
    for prompt, ours, theirs in zip(probe.prompts, trained.answers, written.answers, strict=True):
        same = [a == b for a, b in zip(ours, theirs, strict=False)]
        agreed = same.index(False) if False in same else len(same)
        said = [decode(ids, skip_special_tokens=True).strip() for ids in (ours, theirs)]
        ended = (ours[-1] in stops, theirs[-1] in stops)
        pairs.append(GreedyPair(decode(prompt), said[0], said[1], max(len(ours), len(theirs)), agreed, ended))
    return tuple(pairs)


def figure_verdicts(figures: ExportFigures, limits: ExportLimits) -> tuple[Verdict, ...]:
    loss, kl, share, limit = figures.loss_difference, figures.mean_kl, figures.disagreement, limits.disagreement
    losses = f"{figures.trained_loss:.5f} trained, {figures.written_loss:.5f} written"
    most = figures.loss_limit(limits)
    scatter = f" + {most - limits.loss:.1e} for the scatter of tokens" if limits.rounded else ""
    return (
        Verdict(
            "the loss is the trained model's",
            loss <= most,
            f"{losses}, at most {limits.loss:g}{scatter} apart",
        ),
        Verdict(
            "next tokens have the trained model's probabilities",
            kl <= limits.kl,
            f"mean KL {kl:.1e} nats, at most {limits.kl:g}",
        ),
        Verdict(
            "the likeliest next tokens are the trained model's",
            share <= limit,
            f"{figures.agreement:.4f} are the same; {share:.4f} differ by more than a tie, at most {limit:g}",
        ),
    )


def chat_verdict(run: OpenedRun, tokenizer: Any, probe: Probe) -> Verdict:
    """Whether the written tokenizer renders chats and encodes texts as the run's does."""
    different = []
    for roles in CHATS:
        for prompt in (True, False):
            ours, theirs = (rendered(each, roles, prompt=prompt) for each in (run.tokenizer, tokenizer))
            if ours != theirs:
                different.append(f"{' '.join(roles)}: {theirs[0]!r:.60} for {ours[0]!r:.60}")
    texts = texts_of(run, probe)
    encoded = [each(texts, add_special_tokens=False)["input_ids"] for each in (run.tokenizer, tokenizer)]
    wrong = sum(ours != theirs for ours, theirs in zip(*encoded, strict=True))
    different += [f"{wrong} of {len(texts)} texts have other tokens"] if wrong else []
    evidence = f"{2 * len(CHATS)} chats and {len(texts)} texts give the same tokens"
    return Verdict("chats are rendered as in training", not different, different[0] if different else evidence)


def texts_of(run: OpenedRun, probe: Probe) -> list[str]:
    """What two tokenizers are compared on."""
    return [*(run.tokenizer.decode(document.input_ids) for document in probe.documents), HARD_TEXT]


def rendered(
    tokenizer: Any, roles: list[str], *, prompt: bool, said: Mapping[str, str] = SAID
) -> tuple[str, list[int]]:
    """A chat as text and tokens; the words of a template's refusal, and no tokens."""
    messages = [{"role": role, "content": said[role]} for role in roles]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    except Exception as error:  # a template refuses in its own words; without one it is a ValueError
        return f"{type(error).__name__}: {error}", []
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def stop_verdict(run: OpenedRun, tokenizer: Any, generation: GenerationConfig) -> Verdict:
    """Whether answers of the written model end at the same tokens."""
    stops = {*stop_ids_of(generation)}
    ids = (run.tokenizer.eos_token_id, tokenizer.eos_token_id)
    same = stops == {*run.stop_ids} and ids[0] == ids[1]
    evidence = f"generation stops at {sorted(run.stop_ids)}, the tokenizer's is {ids[0]}"
    if not same:
        evidence += f"; written are {sorted(stops)} and {ids[1]}"
    return Verdict("answers end at the trained model's stop tokens", same, evidence)
