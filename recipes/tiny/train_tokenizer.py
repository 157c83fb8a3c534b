"""build/corpus.txt.gz → the byte-level BPE tokenizer of `tiny`, with its chat template.

    python recipes/tiny/train_tokenizer.py

Needs tokenizers and transformers. Written beside this script: base/tokenizer.json, base/tokenizer_config.json and
base/chat_template.jinja.

`<|end|>` ends a document in pretraining and a turn in a chat, so the base already knows that it means "stop".
`<|pad|>` is another token, so that masking padding never masks an end. Roles are single tokens with no white space
after them, so the tokens of a conversation are the beginning of those of every longer one.
"""

import gzip
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
VOCABULARY = 4096  # a multiple of 64; small, so that the head costs a CPU little
PAD, BEGIN, END, ROLES = "<|pad|>", "<|begin|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role: ' + message['role']) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def train_bpe(corpus: Path) -> Tokenizer:
    """Byte-level BPE: any text round-trips, and no token is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in (PAD, BEGIN, END, *ROLES)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with gzip.open(corpus, "rt", encoding="utf-8") as lines:
        # Without the chats: from their role markers it would learn merges for "<|".
        prose = (line.rstrip("\n") for line in lines if not line.startswith("<|"))
        tokenizer.train_from_iterator(prose, trainer)
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, begin)]),
        ]
    )
    return tokenizer


def main() -> None:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(HERE / "build" / "corpus.txt.gz"),
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(HERE / "base")
    print(f"{len(fast)} tokens written to {HERE / 'base'}")


if __name__ == "__main__":
    main()
