"""The claims, measured: stock code, parity with it, and the bench beside it."""
