"""The modes that use a finished run, a module each; `run_command.py` has their table."""
