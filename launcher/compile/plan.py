"""Compiles regions in place and without graph breaks, warms them up, counts their graphs, then refuses any recompile.

`module.compile(fullgraph=True)` only changes how a module is called. A wrapper would put `_orig_mod.` into the names of
state dicts, and an adapter saved under such names loads as zeros without an error.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch._dynamo

from launcher.compile.dynamo_config import set_in_all_threads
from launcher.compile.explain import message
from launcher.compile.graphs import Work
from launcher.compile.inductor_cache import keep_headers_private
from launcher.compile.observe import COMPILE_ERRORS, Observer, failure_kind
from launcher.compile.regions import Region, select_regions
from launcher.errors import ContractError
from launcher.recipe.schema import CompileSection
from launcher.records.explanation import Explanation

RULES = {  # by observe.failure_kind
    "recompile": "no recompile is allowed after warm-up",
    "limit": "dynamo's recompile limit may not be reached",
    "backend": "the compile backend must accept the graph",
    "break": "no graph break is allowed",
}
GOES_ON = "compile.mode=warn goes on regardless."
# Given with every graph, so that it holds for the backward pass too, which autograd's thread compiles. Inductor would
# otherwise try padded matrix products, and where it kept them, a padded copy of the head.
INDUCTOR_CONFIG = {"shape_padding": False}
# torch 2.13 and later raise this as a plain RuntimeError; before that, the graph count after warm-up shows it.
NOTHING_COMPILED = "fullgraph=True found no compiled frames"


class Plan:
    """The compiled regions of one process. One plan at a time: a new one resets dynamo. Every graph is compiled inside
    `settings()`, whenever and in whichever thread that happens."""

    def __init__(
        self,
        regions: Sequence[Region],
        *,
        compile: CompileSection,
        observer: Observer,
        settings: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.mode = compile.mode
        self.observer = observer
        self._chosen = [] if compile.mode == "off" else select_regions(regions, compile)
        self._settings = settings
        inner = self._backend(compile.backend)
        torch._dynamo.reset()
        self.release()
        expected: Counter[str] = Counter()
        for region in self._chosen:
            expected[region.name] += region.graphs
            self._apply(region, inner)
        observer.expected = dict(expected)
        # Dynamo limits the graphs of one piece of code; the plan may need more.
        graphs = max((region.graphs for region in self._chosen), default=0)
        set_in_all_threads("recompile_limit", max(torch._dynamo.config.recompile_limit, graphs))

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Context for running compiled code: a compile error becomes a ContractError with its remedy."""
        try:
            yield
        except COMPILE_ERRORS as error:
            rule = RULES[failure_kind(type(error).__name__)]
            raise _broken(f"{rule}: ", [self.observer.explain_error(error)]) from error
        except RuntimeError as error:
            if NOTHING_COMPILED not in str(error):
                raise
            raise _broken(f"{RULES['break']}: ", [self.observer.explain_error(error)]) from error

    def warm_up(self, run: Callable[[], None]) -> None:
        """Call `run`, which passes every planned shape through forward and backward, then check the graphs.

        strict: any compile error, and any difference from the expected graphs, is a ContractError.
        warn: if anything cannot be compiled, everything runs uncompiled, and the record says so.
        """
        self.call(run)
        compiled = self.observer.graphs_by_region()
        if self.mode == "strict" and compiled != self.observer.expected:
            raise _count_error(self.observer, compiled)

    def arm(self) -> None:
        """Warm-up is over on every rank: from now on any compilation is unplanned, and in strict mode an error."""
        self.observer.arm()
        set_in_all_threads("error_on_recompile", self.mode == "strict")

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that runs compiled code. In warn mode, after a compile error, everything runs uncompiled and
        the function is called again; so it must be repeatable."""
        try:
            with self.enforced():
                return function(*arguments)
        except ContractError as error:
            if self.mode == "strict":
                raise
            self.fall_back(str(error).splitlines()[0])
            return function(*arguments)

    def check(self) -> None:
        """In strict mode, raise ContractError if anything was compiled after warm-up, new frames included."""
        if self.mode == "strict" and self.observer.unplanned:
            happened = f"{self.observer.unplanned} compilation(s) happened: "
            raise _broken(f"after warm-up nothing may be compiled; {happened}", self.observer.record().explanations)

    def fall_back(self, why: str) -> None:
        """Run every region uncompiled from now on (compile.mode=warn), and say so in the record."""
        for region in self._chosen:
            for module in region.modules:
                module._compiled_call_impl = None
            if region.function is not None and region.install is not None:
                region.install(region.function)
        self.observer.fallbacks.append(f"all regions run uncompiled: {why}")

    def release(self) -> None:
        """Allow other code of this process to compile again."""
        set_in_all_threads("error_on_recompile", False)

    def checked(self, work: Work, *, tokens: int, train: bool) -> Callable[[], bool]:
        """`work`, a pass over a micro batch of `tokens` positions, which then returns whether it ran compiled: whether
        it made every planned call of compiled code. Strict: raises ContractError where it did not."""
        calls = self.observer.calls
        expected: Counter[str] = Counter()
        for region in self._chosen:
            expected[region.name] += region.forward_calls(tokens, train)
            expected[f"{region.name} backward"] += region.backward_calls if train else 0
        expected = +expected
        if train and sum(expected.values()) >= sum(self.observer.expected_calls.values()):
            self.observer.expected_calls = dict(expected)

        def run() -> bool:
            before = calls.copy()
            work()
            made = calls - before
            compiled = bool(expected) and all(
                made[name] >= n if name.endswith(" backward") else made[name] == n for name, n in expected.items()
            )
            if self.mode == "strict" and not compiled:
                raise ContractError(_calls_message(expected, made))
            return compiled

        return run

    def _backend(self, name: str) -> Callable[..., Any]:
        """The backend of this name, which compiles with the plan's settings."""
        inner = torch._dynamo.lookup_backend(name)
        options: dict[str, Any] = {}
        if name == "inductor":
            patches = INDUCTOR_CONFIG | {"deterministic": torch.are_deterministic_algorithms_enabled()}
            options = {"config_patches": patches}
            keep_headers_private()

        def compile(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
            with self._settings():
                return inner(graph, example_inputs, **options)

        return compile

    def _apply(self, region: Region, inner: Callable[..., Any]) -> None:
        options: dict[str, Any] = {
            "fullgraph": True,
            "dynamic": False,
            "backend": self.observer.backend(region.name, inner),
        }
        for module in region.modules:
            module.compile(**options)
        if region.function is not None:
            assert region.install is not None, "a function is replaced by its compiled form"
            region.install(torch.compile(region.function, **options))


def _broken(rule: str, explanations: Sequence[Explanation], *, rest: str = "") -> ContractError:
    """The rule, what happened (of several the last) with line, values and remedy, and dynamo's own words."""
    last = explanations[-1]
    text, brief = f"{rule}{message(last, remedy='' if rest else GOES_ON)}", f"{rule}{last.what}".removesuffix(":")
    return ContractError(f"{text}{rest}", brief=brief + (rest or f".\n{GOES_ON}"), explanations=explanations)


def _calls_message(expected: Counter[str], made: Counter[str]) -> str:
    return (
        f"every micro batch must run compiled code ({_counts(expected)}); one ran {_counts(made)}.\n"
        "Something turned compiled code off: torch.compiler.set_stance or disable, TORCHDYNAMO_DISABLE, or a forward "
        "that was replaced.\nTake it out, or run with compile.mode=warn."
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items())) or "none"


def _count_error(observer: Observer, compiled: dict[str, int]) -> ContractError:
    found = f"({_counts(observer.expected)}); it compiled {_counts(compiled)}.\n"
    rule = f"warm-up must compile exactly the planned graphs {found}More than planned: "
    rest = f"\nFewer: part of the model was skipped by the compiler. {GOES_ON}"
    if explanations := observer.record().explanations:
        return _broken(f"{rule}calls that should be equal differ. ", explanations, rest=rest)
    return ContractError(f"{rule}none.{rest}")
