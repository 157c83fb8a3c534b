"""The proof section of a recipe: what is compared with stock code, and how much of it."""

from typing import Annotated, Literal

from pydantic import Field

from launcher.recipe.field_types import OnOff, RecipeSection


class ProofSection(RecipeSection):
    """How much a proof measures."""

    parity: int = Field(16, ge=1, description="Batches that mode=parity compares.")
    bench: int = Field(20, ge=1, description="Steps that mode=bench measures on each side.")
    bench_rows: Literal["data", "random"] = Field(
        "data", description="What mode=bench trains on; random: blocks of max_length random tokens, all supervised."
    )
    bench_naive: Annotated[Literal["checkpointed", "plain", "on", "off"], OnOff] = Field(
        "on",
        description="Stock code that mode=bench measures too: with gradient checkpointing, without it (plain), on: "
        "both, or off.",
    )
    start: Annotated[Literal["auto", "on", "off"], OnOff] = Field(
        "auto",
        description="Comparison of loss and gradients with stock code before the first step; auto: of architectures "
        "without a row, which model.family=auto takes.",
    )
