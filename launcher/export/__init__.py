"""From a finished run to a model in use: answers, a folder that stock code loads, and the proof that it is the one."""
