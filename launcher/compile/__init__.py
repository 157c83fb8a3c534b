"""The compile contract: what is compiled (regions), how (plan), and an honest count of what happened (observe)."""
