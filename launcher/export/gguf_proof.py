"""Is a GGUF file the model that was trained? Read by gguf's own reader, by Transformers, and by llama.cpp where
llama-cpp-python is installed.

A K-quant is proved in two steps: the fp32 file that llama-quantize was given holds base + update, element by element,
and what it made of it is as near as that type can be.
"""

import io
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from launcher.data.documents import Document
from launcher.export.gguf_file import ROPE, GgufPlan, default_frequencies, source_of
from launcher.export.gguf_vocabulary import STOP_KEYS
from launcher.export.limits import BLOCK_ERRORS
from launcher.export.load_run import OpenedRun
from launcher.export.proof import (
    ANSWER_TOKENS,
    CHATS,
    ModelOutputs,
    Probe,
    figure_verdicts,
    figures_of,
    outputs_of,
    rendered,
    texts_of,
)
from launcher.export.weights import ROUNDINGS, SUM_ERROR, is_rounded, trained_weight, weights_are
from launcher.model.families import head_width
from launcher.records.export import ExportLimits
from launcher.records.run import Verdict

DTYPES_OF = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
Q8_STEPS = ROUNDINGS + 127 * 2**-11  # of a block's step that a weight of Q8_0 may be away: the step itself is in fp16
TOKENS_AT_ONCE = 512  # tokens that llama.cpp is given at once: 250 MiB of logits at a vocabulary of 128,256


@torch.no_grad()
def gguf_weights_verdict(model: PeftModel, plan: GgufPlan, file: Path) -> Verdict:
    """As weights_verdict, of a GGUF file. What a K-quant was made from is removed."""
    base: Any = model.get_base_model()
    wrong, loose = set(), set()
    exact = {tensor.name: tensor for tensor in GGUFReader(file if plan.direct else source_of(file)).tensors}
    made = exact if plan.direct else {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    extra = {ROPE} if plan.merge.run.config.rope_parameters["rope_type"] != "default" else set()
    wrong |= (exact.keys() ^ (plan.names.keys() | extra)) | (exact.keys() ^ made.keys())
    for name in plan.names.keys() & exact.keys() & made.keys():
        expected = trained_weight(base, plan.names[name], plan.merge).float().cpu()
        if plan.architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            pairs = expected.unflatten(0, (-1, head_width(plan.merge.run.config)))  # [heads, width, D]
            expected = torch.stack(pairs.chunk(2, 1), 2).flatten(0, 2)
        if not _is_near(exact[name], expected):
            wrong.add(name)
        elif not plan.direct and not _is_near(made[name], expected):
            loose.add(name)
    if ROPE in exact and ROPE in made:
        frequencies = default_frequencies(plan.merge.run) / _values(made[ROPE]).double()
        trained = base.model.rotary_emb.inv_freq.double().cpu()
        if frequencies.shape != trained.shape or not torch.allclose(frequencies, trained, rtol=1e-5, atol=0):
            wrong.add(ROPE)
    source_of(file).unlink(missing_ok=True)
    whole = f"{len(exact) - len(wrong) - len(loose)} of {len(exact)} tensors are base + update, rounded to their type"
    return weights_are(whole, wrong | loose)


def _is_near(tensor: ReaderTensor, expected: Tensor) -> bool:
    """Whether it is `expected` as near as its type allows."""
    kind, found = tensor.tensor_type, _values(tensor)
    if found.shape != expected.shape:
        return False
    if kind in DTYPES_OF:
        return is_rounded(found, expected)
    error = (found - expected).abs()
    if kind == GGMLQuantizationType.Q8_0:
        step = expected.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
        bound = Q8_STEPS * step + SUM_ERROR * expected.abs().max() + 127 * 2**-25
        return bool((error.unflatten(-1, (-1, 32)) <= bound).all())
    limit = BLOCK_ERRORS.get(kind.name, 0.0)
    return bool(error.square().mean() <= limit**2 * expected.square().mean())


def _values(tensor: ReaderTensor) -> Tensor:
    data = np.array(tensor.data)
    if dtype := DTYPES_OF.get(tensor.tensor_type):
        return torch.from_numpy(data).view(dtype)
    return torch.from_numpy(gguf.dequantize(data, tensor.tensor_type))


def load_gguf(run: OpenedRun, file: Path) -> tuple[Any, Any, GenerationConfig, list[Verdict], list[str]]:
    """What Transformers makes of the file: model, tokenizer, where answers end; verdicts, and notes."""
    where: dict[str, Any] = {"gguf_file": file.name}
    config = AutoConfig.from_pretrained(str(file.parent), trust_remote_code=False, **where)
    fields, notes = GGUFReader(file).fields, _complete(config, run)
    with redirect_stderr(io.StringIO()):  # its bar of progress
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            config=config,
            dtype=torch.float32 if run.device.type == "cpu" else run.dtype,
            device_map={"": run.device},
            output_loading_info=True,
            trust_remote_code=False,
            **where,
        )
    model, info = loaded
    wrong = [name for names in info.values() for name in names]
    evidence = f"stock transformers fills every weight; {len(wrong)} are missing, left over or of another shape"
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), trust_remote_code=False, **where)
    keys = [f"tokenizer.ggml.{key}_token_id" for key in STOP_KEYS]
    stops = [int(fields[key].contents()) for key in keys if key in fields]
    verdict = Verdict("the folder loads whole", not wrong, evidence)
    return model.eval(), tokenizer, GenerationConfig(eos_token_id=stops), [verdict], notes


def _complete(config: Any, run: OpenedRun) -> list[str]:
    """Give a config what Transformers does not read of a GGUF file, and say so; all else stays as it was read."""
    ours, theirs = run.config.rope_parameters, config.rope_parameters
    given = {"head_dim": head_width(run.config)} if head_width(config) != head_width(run.config) else {}
    if ours["rope_type"] != theirs.get("rope_type", "default") and ours["rope_theta"] == theirs["rope_theta"]:
        given["rope_parameters"] = ours
    for key, value in given.items():
        setattr(config, key, value)
    return [f"Transformers does not read {key} of a GGUF file: here it was given the base's" for key in given]


class LlamaCppModel:
    """llama.cpp, TOKENS_AT_ONCE tokens at a time: the logits of no more are in memory, however long a document is."""

    def __init__(self, file: Path, *, positions: int) -> None:
        from llama_cpp import Llama, llama_batch_init

        self.llama = Llama(str(file), n_ctx=positions, n_batch=TOKENS_AT_ONCE, verbose=False)
        self._batch = llama_batch_init(TOKENS_AT_ONCE, 0, 1)

    def supervised_logits(self, document: Document) -> Iterator[tuple[Tensor, Tensor]]:
        """As those of a stock model: logits fp32 [R, V] and targets [R]."""
        ids, supervised = torch.tensor(document.input_ids).long(), torch.tensor(document.supervised)
        for start in range(0, len(ids) - 1, TOKENS_AT_ONCE):
            targets = ids[start + 1 : start + 1 + TOKENS_AT_ONCE]  # position t predicts token t + 1
            wanted = supervised[start + 1 : start + 1 + TOKENS_AT_ONCE]
            logits = self._decoded(ids[start : start + len(targets)].tolist(), start)
            if wanted.any():
                yield logits[wanted], targets[wanted]

    def greedy(self, prompt: list[int]) -> list[int]:
        """The next ANSWER_TOKENS tokens, up to what llama.cpp itself takes for the end of an answer."""
        from llama_cpp import llama_model_get_vocab, llama_vocab_is_eog

        for start in range(0, len(prompt), TOKENS_AT_ONCE):
            logits = self._decoded(prompt[start : start + TOKENS_AT_ONCE], start)
        answer = [int(logits[-1].argmax())]
        while len(answer) < ANSWER_TOKENS:
            if llama_vocab_is_eog(llama_model_get_vocab(self.llama.model), answer[-1]):
                break
            logits = self._decoded(answer[-1:], len(prompt) + len(answer) - 1)
            answer.append(int(logits[-1].argmax()))
        return answer

    def _decoded(self, ids: list[int], past: int) -> Tensor:
        """Logits fp32 [len(ids), V] of the tokens after the `past` before them; the next call overwrites them."""
        from llama_cpp import llama_decode, llama_get_logits, llama_get_memory, llama_memory_clear

        if past == 0:
            llama_memory_clear(llama_get_memory(self.llama.ctx), True)
        self._batch.n_tokens = len(ids)
        for row, token in enumerate(ids):
            self._batch.token[row], self._batch.pos[row] = token, past + row
            self._batch.n_seq_id[row], self._batch.seq_id[row][0], self._batch.logits[row] = 1, 0, 1
        if code := llama_decode(self.llama.ctx, self._batch):
            raise RuntimeError(f"llama_decode ended with {code}")
        shape = (len(ids), self.llama.n_vocab())
        return torch.from_numpy(np.ctypeslib.as_array(llama_get_logits(self.llama.ctx), shape=shape))


def llama_cpp_verdict(run: OpenedRun, file: Path, probe: Probe, trained: ModelOutputs, limits: ExportLimits) -> Verdict:
    """Whether llama.cpp computes, splits texts and ends answers as the trained model does."""
    longest = max(*(len(document) for document in probe.documents), *map(len, probe.prompts))
    try:
        model = LlamaCppModel(file, positions=longest + ANSWER_TOKENS)
    except (ImportError, OSError, ValueError) as error:
        return Verdict("llama.cpp reads the trained model", False, f"it does not load: {error}")
    outputs = outputs_of(model.supervised_logits, model.greedy, probe, run.config.vocab_size)
    figures = figures_of(trained, outputs, probe)
    broken = [verdict.claim for verdict in figure_verdicts(figures, limits) if not verdict.holds]
    texts = texts_of(run, probe) + [
        text for text, ids in (rendered(run.tokenizer, roles, prompt=True) for roles in CHATS) if ids
    ]
    expected = run.tokenizer(texts, add_special_tokens=False)["input_ids"]
    found = [model.llama.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    if other := sum(a != b for a, b in zip(expected, found, strict=True)):
        broken.append(f"{other} of {len(texts)} texts have other tokens")
    stops = {*run.stop_ids}
    ends = [not stops & {*ids[:-1]} and (ids[-1] in stops or len(ids) == ANSWER_TOKENS) for ids in outputs.answers]
    if not all(ends):
        broken.append(f"{ends.count(False)} answers do not end at {sorted(stops)}")
    same = sum(a == b for a, b in zip(trained.answers, outputs.answers, strict=True))
    evidence = (
        f"loss {figures.written_loss:.5f}, mean KL {figures.mean_kl:.1e}, {same} of {len(trained.answers)} greedy "
        f"answers and the tokens of {len(texts)} texts are the same"
    )
    return Verdict("llama.cpp reads the trained model", not broken, evidence + "".join(f"; not: {b}" for b in broken))
