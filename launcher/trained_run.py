"""What launcher.run returns: the record of a run, and its adapter to talk to."""

from dataclasses import asdict
from functools import cached_property
from typing import Any

from launcher.commands.finished_run import located
from launcher.errors import RecipeError
from launcher.recipe.run_options import GenerateOptions, read_options
from launcher.records.run import RunRecord
from launcher.runtime.environment import environment_put_back
from launcher.runtime.failures import classified
from launcher.runtime.ranks import RankInfo

ALONE = RankInfo(0, 0, 1, 1)


class TrainedRun(RunRecord):
    """A RunRecord that answers. Its model is loaded by the first `generate` and kept until `free`."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A row a step for pandas.DataFrame: what metrics.jsonl says of it, with `eval_loss` in the row of its step.
        Row 0 is the evaluation before the first update."""
        rows: dict[int, dict[str, Any]] = {record.step: asdict(record) for record in self.steps}
        for record in self.evals:
            rows.setdefault(record.step, {"step": record.step})["eval_loss"] = record.eval_loss
        return [rows[step] for step in sorted(rows)]

    def generate(
        self, prompt: str | list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None, **options: Any
    ) -> str:
        """The trained model's answer to a message, or to a chat of messages with "role" and "content" and what else
        rows of data may have, such as "tool_calls". `tools`: JSON schemas of functions that the model may call.

        `options`: temperature, top_p, max_tokens, seed, and base=True for the answer with the adapter off, as of
        mode=generate. Raises the errors of launcher/errors.py.
        """
        words = [f"{name}={value}" for name, value in options.items()]
        if chosen := {"prompt", "prompts", "run"} & options.keys():
            raise RecipeError(f"generate() has its prompt and its run; got {', '.join(sorted(chosen))} too")
        settings = read_options([f"run={self.start.run_dir}", "mode=generate", *words], "generate")
        assert isinstance(settings, GenerateOptions), "the options of mode=generate"
        with classified(ALONE):
            from launcher.export.generate import Answerer, prompt_of_chat

            run, model = self._loaded
            asked = prompt_of_chat(prompt, run, tools)
            return Answerer(run, model, settings).answer(asked.content, base=settings.base, tools=asked.tools).text

    def free(self) -> None:
        """Give the memory of the loaded model back; the next `generate` loads it again."""
        if loaded := self.__dict__.pop("_loaded", None):
            from launcher.export.load_run import free_memory

            device = loaded[0].device
            del loaded
            free_memory(device)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The opened run, and the trained model on its NF4 base."""
        from launcher.export.load_run import load_trained, open_run

        options = GenerateOptions(run=self.start.run_dir)
        with environment_put_back() as prepared:
            place, source = located(options)
            prepared()
            run = open_run(place, source, ALONE)
            return run, load_trained(run)[0]

    def __repr__(self) -> str:
        """One line: a record holds every step."""
        loss = f"loss {self.steps[0].loss:.4f} to {self.steps[-1].loss:.4f}" if self.steps else "no step"
        return f"TrainedRun({self.start.recipe}, {len(self.steps)} steps, {loss}, adapter={self.adapter})"
