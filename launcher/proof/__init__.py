"""What the project claims, measured: parity with stock code (parity.py, gate.py) and the bench against it."""
