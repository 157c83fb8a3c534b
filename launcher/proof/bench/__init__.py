"""mode=bench: our step beside that of stock transformers, PEFT and bitsandbytes, each in a process of its own."""
