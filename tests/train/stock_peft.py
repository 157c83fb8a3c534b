"""Run in a process and a folder of its own by the tests: the loss that stock PEFT gives to a saved adapter.

Arguments: adapter folder, file of [token ids, shifted labels] pairs, dtype, device. Prints the mean loss per supervised
token. It never imports the launcher.
"""

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def main() -> None:
    folder, probe, dtype_name, device = sys.argv[1:]
    dtype = getattr(torch, dtype_name)
    with open(folder + "/adapter_config.json") as file:
        base_name = json.load(file)["base_model_name_or_path"]
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    base = AutoModelForCausalLM.from_pretrained(
        base_name, quantization_config=settings, dtype=dtype, device_map={"": device}
    )
    model = PeftModel.from_pretrained(base, folder).train()
    AutoTokenizer.from_pretrained(folder)
    with open(probe) as file:
        documents = json.load(file)
    total = tokens = 0.0
    for ids, labels in documents:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids], device=device)).logits[0].float()
        wanted = torch.tensor(labels, device=device)
        total += torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum").item()
        tokens += sum(label != -100 for label in labels)
    assert "launcher" not in sys.modules
    print(total / tokens)


main()
