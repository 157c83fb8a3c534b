"""build/corpus.txt.gz + base/tokenizer.json → base/model.safetensors: the small Llama that `tiny` fine-tunes.

    python recipes/tiny/pretrain.py [--out recipes/tiny/base] [--tokens 250_000_000] [--rows 256] [--lr 3e-3]

Needs torch, transformers and tokenizers. Takes minutes on one data-centre GPU in bf16; a CPU is enough for a trial
(`--tokens 40_000 --rows 4 --no-compile`). Prints the loss, the throughput and, at each evaluation, the loss on
build/heldout.txt: synsets that the corpus never mentions. Shapes: B rows of S tokens, vocabulary V.
"""

import argparse
import gzip
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
LENGTH = 256  # S; a document has about 40 tokens
WARMUP, WEIGHT_DECAY = 0.04, 0.1
SEED = 0
Ids = npt.NDArray[np.uint16]  # one document's token ids


def architecture(tokenizer: Tokenizer) -> LlamaConfig:
    """Llama 3's shape in small: grouped queries, head_dim 64, linear dimensions in multiples of NF4's block of 64."""
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.token_to_id("<|pad|>"),
        bos_token_id=tokenizer.token_to_id("<|begin|>"),
        eos_token_id=tokenizer.token_to_id("<|end|>"),
    )


def encode(tokenizer: Tokenizer, lines: list[str]) -> list[Ids]:
    """Each document's ids, uint16, from `<|begin|>` (the tokenizer adds it) to `<|end|>`."""
    end = [tokenizer.token_to_id("<|end|>")]
    return [np.array(e.ids + end, dtype=np.uint16) for e in tokenizer.encode_batch(lines)]


def rows_of_epoch(documents: list[Ids], order: npt.NDArray[np.int64]) -> Ids:
    """[rows, S + 1]: a row begins with a document and takes as many as fit; the last one is cut off."""
    stream = np.concatenate([documents[i] for i in order])
    starts = np.cumsum([0] + [len(documents[i]) for i in order])
    firsts, at = [], 0
    while at < len(starts) and starts[at] + LENGTH + 1 <= len(stream):
        firsts.append(starts[at])
        at = int(np.searchsorted(starts, starts[at] + LENGTH + 1))
    return stream[np.array(firsts)[:, None] + np.arange(LENGTH + 1)]


def batches(documents: list[Ids], *, rows: int, steps: int, device: torch.device) -> Iterator[Tensor]:
    """`steps` batches [B, S + 1] of int64 ids; every epoch shuffles the documents and packs them again."""
    shuffle = np.random.default_rng(SEED)
    made = 0
    while made < steps:
        packed = torch.from_numpy(rows_of_epoch(documents, shuffle.permutation(len(documents))).astype(np.int64))
        packed = packed[torch.from_numpy(shuffle.permutation(len(packed)))].to(device)
        if len(packed) < rows:
            raise ValueError(f"--rows must be at most the rows of an epoch: {rows} > {len(packed)}; lower it")
        for batch in packed[: len(packed) // rows * rows].split(rows)[: steps - made]:
            made += 1
            yield batch


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Add dropout to the output of attention and MLP: Llama has none, and training for many epochs needs it."""

    def drop(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.dropout(output, rate, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def optimizer_of(model: nn.Module, *, lr: float, fused: bool) -> torch.optim.AdamW:
    """AdamW that decays only the matrices of the layers, not the norms nor the tied embedding."""
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)


def lr_scale(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = max(1, int(WARMUP * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy of a [B, S + 1] batch, in nats per token. bf16 on a GPU; many CPUs only emulate it."""
    with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=batch.is_cuda):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, documents: list[Ids], device: torch.device) -> float:
    """Mean loss over the tokens of the documents, in nats; one document a row, padded on the right."""
    model.eval()
    longest = max(map(len, documents))
    ids = torch.full((len(documents), longest), -100)
    for i, document in enumerate(documents):
        ids[i, : len(document)] = torch.from_numpy(document.astype(np.int64))
    ids = ids.to(device)
    logits = model(input_ids=ids[:, :-1].clamp(min=0), use_cache=False).logits
    model.train()
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).item()


def train(model: LlamaForCausalLM, documents: list[Ids], heldout: list[Ids], args: argparse.Namespace) -> None:
    """Train in place; print a line every `--report` steps, the only ones that wait for the device."""
    device = next(model.parameters()).device
    steps = max(1, args.tokens // (args.rows * LENGTH))
    forward = torch.compile(loss_of, dynamic=False) if args.compile else loss_of
    optimizer = optimizer_of(model, lr=args.lr, fused=device.type == "cuda")
    began = time.perf_counter()
    for step, batch in enumerate(batches(documents, rows=args.rows, steps=steps, device=device)):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * lr_scale(step, steps)
        loss = forward(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % args.report == 0 or step == steps - 1:
            line = f"step {step + 1}/{steps} loss {loss.item():.4f} held-out {heldout_loss(model, heldout, device):.4f}"
            elapsed = time.perf_counter() - began
            print(f"{line} {elapsed:.1f} s {(step + 1) * args.rows * LENGTH / elapsed:.0f} tok/s", flush=True)


def save(model: LlamaForCausalLM, out: Path) -> None:
    """bf16 safetensors, config.json and generation_config.json."""
    nn.Module.to(model, torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "base")
    parser.add_argument("--tokens", type=int, default=250_000_000, help="tokens seen in all")
    parser.add_argument("--rows", type=int, default=256, help=f"rows of {LENGTH} tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--dropout", type=float, default=0.25, help="on the output of attention and MLP, 0-1")
    parser.add_argument("--report", type=int, default=250, help="steps between two lines")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    tokenizer = Tokenizer.from_file(str(HERE / "base" / "tokenizer.json"))
    corpus = gzip.decompress((HERE / "build" / "corpus.txt.gz").read_bytes()).decode().splitlines()
    documents = encode(tokenizer, corpus)
    heldout = encode(tokenizer, (HERE / "build" / "heldout.txt").read_text("utf-8").splitlines())
    model = LlamaForCausalLM(architecture(tokenizer)).train()
    nn.Module.to(model, device)
    print(f"{sum(map(len, documents))} tokens in {len(documents)} documents, {model.num_parameters()} parameters")
    add_dropout(model, args.dropout)
    train(model, documents, heldout, args)
    save(model, args.out)


if __name__ == "__main__":
    main()
