"""Run in a process of its own by the tests: what stock Transformers makes of an exported folder.

Arguments: folder, file of [token ids, mask of supervised tokens] pairs. Prints the mean loss of the supervised tokens,
the dtype, and a rendered chat. It never imports the launcher.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    folder, documents = sys.argv[1:]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    dtype = str(model.dtype)
    model.float()  # CPUs without bfloat16 would take minutes
    losses = []
    with open(documents) as file, torch.no_grad():
        for ids, supervised in json.load(file):
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            each = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
            losses.append(each[torch.tensor(supervised[1:])])
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert "launcher" not in sys.modules and not hasattr(model.config, "quantization_config")
    print(json.dumps({"loss": float(torch.cat(losses).mean()), "dtype": dtype, "chat": chat}))


main()
