"""Writes a merged model as one GGUF file for llama.cpp and what is built on it: no more than one tensor is in memory.

Each tensor is base + scale * B A in fp32 (export/merge.py), rounded once to its type. K-quants are made by llama.cpp's
own llama-quantize from a file in fp32. llama.cpp rotates neighbouring features of a head, Transformers features that
are half a head apart: rows of q and k of the architecture "llama" change places.
"""

import math
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import psutil
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from launcher.errors import MemoryExhausted, RecipeError
from launcher.export.gguf_vocabulary import Vocabulary, vocabulary_of
from launcher.export.load_run import OpenedRun
from launcher.export.merge import Change, MergePlan, check_updates, merged_weight
from launcher.export.place import QUANTIZE_TOOL
from launcher.memory.ledger import MIB
from launcher.model.families import head_width
from launcher.model.layer_kinds import layer_kinds

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen3": "qwen3"}  # by model_type; llama.cpp's names
F32, ROPE = GGMLQuantizationType.F32, "rope_freqs.weight"
TYPES = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}  # others: llama-quantize makes them
BITS = {"q4_k_m": 5, "q5_k_m": 6, "q6_k": 7}  # a weight, rounded up: for the space on the disk
TOOL_LINES = 2  # of llama-quantize's own words


@dataclass(frozen=True)
class GgufPlan:
    """What is written: the tensors by GGUF's names, in order."""

    merge: MergePlan
    quantization: str
    vocabulary: Vocabulary
    names: Mapping[str, str]  # Transformers' by GGUF's

    @property
    def architecture(self) -> str:
        return ARCHITECTURES[self.merge.run.config.model_type]

    @property
    def direct(self) -> bool:
        """Whether it is written without llama-quantize."""
        return self.quantization in TYPES

    @property
    def nbytes(self) -> int:
        """Of all that is on the disk at a time."""
        count = sum(math.prod(shape) for shape in self.merge.shapes.values())
        made = 0 if self.direct else count * BITS[self.quantization] // 8
        return made + sum(self.nbytes_of(name) for name in self.names)

    def type_of(self, name: str) -> GGMLQuantizationType:
        """As llama.cpp's converter: vectors in fp32, what does not fill blocks in 16 bits."""
        shape = self.merge.shapes[self.names[name]]
        if len(shape) < 2 or not self.direct:
            return F32
        kind = TYPES[self.quantization][0]
        return GGMLQuantizationType.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind

    def nbytes_of(self, name: str) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type_of(name)]
        return math.prod(self.merge.shapes[self.names[name]]) // block * size


def plan_gguf(merge: MergePlan, quantization: str) -> GgufPlan:
    """`merge` is in fp32. Raises RecipeError for what GGUF or llama.cpp's architecture cannot express."""
    config = merge.run.config
    if config.model_type not in ARCHITECTURES:
        raise RecipeError(
            f"format=gguf writes the architectures {', '.join(ARCHITECTURES)}; this model is {config.model_type!r}.\n"
            "Use format=merged, and llama.cpp's convert_hf_to_gguf.py if it knows the model."
        )
    rope, architecture = config.rope_parameters, ARCHITECTURES[config.model_type]
    vocabulary, refused = vocabulary_of(merge.run)
    known = gguf.get_tensor_name_map(
        {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], config.num_hidden_layers
    )
    names = {known.get_name(name, (".weight",)) or "": name for name in merge.shapes}
    longest = min(merge.run.place.recipe.data.max_length, config.max_position_embeddings)
    wrong = {
        f"hidden_act={config.hidden_act}": config.hidden_act != "silu",
        f"rope_type={rope['rope_type']}": rope["rope_type"] not in ("default", "llama3"),
        f"a sliding window shorter than the {longest} tokens of a document": positions_of(merge.run) < longest,
        "a rotation of a part of a head": rope.get("partial_rotary_factor", 1.0) != 1.0,
        f"the weight {names.get('')}, which llama.cpp's {architecture} lacks": "" in names,
    }
    refused += [what for what, holds in wrong.items() if holds]
    if refused or vocabulary is None:
        raise RecipeError(
            f"format=gguf writes what llama.cpp computes; it cannot write {', '.join(refused)}.\n"
            "Use format=merged, which Transformers and servers built on it load."
        )
    return GgufPlan(merge, quantization, vocabulary, names)


def check_proof_memory(plan: GgufPlan) -> None:
    """Raise MemoryExhausted unless the host can hold what the proof loads: Transformers reads all weights in fp32."""
    needed, free = 4 * sum(map(math.prod, plan.merge.shapes.values())), psutil.virtual_memory().available
    if needed > free:
        raise MemoryExhausted(
            f"the proof of a GGUF file holds the whole model in fp32 in host memory; it needs {needed / MIB:,.0f} MiB, "
            f"{free / MIB:,.0f} MiB are available.\nEnd what else uses it, take a machine with more, or use "
            "format=merged and llama.cpp's convert_hf_to_gguf.py."
        )


def write_gguf(plan: GgufPlan, updates: Mapping[str, Change], file: Path, *, progress: Callable[[int], object]) -> None:
    """Write `file`; where llama-quantize is needed, what it was made from lies beside it, as `source_of` says.

    `progress` is told how many tensors are done. Raises RecipeError where llama-quantize fails.
    """
    check_updates(plan.merge, updates)
    path = file if plan.direct else source_of(file)
    writer = GGUFWriter(path, plan.architecture)
    _add_metadata(writer, plan, file.stem)
    for name in plan.names:
        shape = plan.merge.shapes[plan.names[name]]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), plan.nbytes_of(name), plan.type_of(name))
    factors = rope_factors(plan.merge.run)
    if factors is not None:
        writer.add_tensor_info(ROPE, factors.shape, np.dtype(np.float32), factors.numel() * 4, F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, (name, source) in enumerate(plan.names.items()):
        weight = merged_weight(plan.merge, source, updates.get(source)).float().cpu()
        if plan.architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = interleaved(weight, head_width(plan.merge.run.config))
        writer.write_tensor_data(gguf.quantize(weight.numpy(), plan.type_of(name)))
        progress(done + 1)
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    writer.close()
    if not plan.direct:
        _run_tool(path, file, plan.quantization)


def source_of(file: Path) -> Path:
    """The fp32 file that llama-quantize reads."""
    return file.with_name(f"{file.stem}.f32.gguf")


def interleaved(weight: Tensor, width: int) -> Tensor:
    """Rows [half, feature] of each head of `width` features as [feature, half]; `weight` [heads * width, D]."""
    halves = weight.unflatten(0, (-1, 2, width // 2))
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def rope_factors(run: OpenedRun) -> Tensor | None:
    """What llama.cpp divides the default rotary frequencies by, fp32 [width / 2]; None for the default."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = run.config.rope_parameters
    if rope["rope_type"] == "default":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](run.config, torch.device("cpu"))
    return (default_frequencies(run) / scaled.double()).float()


def default_frequencies(run: OpenedRun) -> Tensor:
    """fp64 [width / 2], from the base of the rotation alone."""
    width = head_width(run.config)
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    return float(run.config.rope_parameters["rope_theta"]) ** -exponents


def positions_of(run: OpenedRun) -> int:
    """For how many tokens llama.cpp computes what the model does: it knows no sliding window here."""
    most: int = run.config.max_position_embeddings
    return min(kind.window or most for kind in layer_kinds(run.config, max_length=most))


def _add_metadata(writer: GGUFWriter, plan: GgufPlan, name: str) -> None:
    config, run = plan.merge.run.config, plan.merge.run
    writer.add_type("model")
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(positions_of(run))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_width(config))
    writer.add_value_length(head_width(config))
    writer.add_rope_dimension_count(head_width(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(TYPES[plan.quantization][1] if plan.direct else LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    plan.vocabulary.write(writer)


def _run_tool(source: Path, file: Path, quantization: str) -> None:
    done = subprocess.run(
        [QUANTIZE_TOOL, str(source), str(file), quantization.upper()], capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-TOOL_LINES:]
        raise RecipeError(
            f"{QUANTIZE_TOOL} must make {quantization} of the file; it ended with code {done.returncode}:\n"
            + "\n".join(said)
            + "\nUse quantization=q8_0, which needs no tool, or another llama.cpp."
        )
