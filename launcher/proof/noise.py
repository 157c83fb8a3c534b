"""Leaves out what several models cannot draw or begin with alike. Imports no torch."""

from dataclasses import replace

from launcher.train.request import Request

DROPOUT, NEFTUNE = ("lora", "dropout"), ("train", "neftune_alpha")


def without_noise(request: Request, *keys: tuple[str, str]) -> tuple[Request, tuple[str, ...]]:
    """The request with these keys (section, name) at 0, and a note on each that it asked for: several models cannot
    draw the same numbers."""
    recipe, notes = request.recipe, []
    for section, key in keys:
        if asked := getattr(getattr(recipe, section), key):
            quiet = getattr(recipe, section).model_copy(update={key: 0.0})
            recipe = recipe.model_copy(update={section: quiet})
            notes.append(f"measured with {section}.{key}=0, not the recipe's {asked:g}")
    return replace(request, recipe=recipe), tuple(notes)


def with_plain_start(request: Request) -> tuple[Request, tuple[str, ...]]:
    """The request for stock code that is only timed: an adapter that starts from the base's weights begins at zero, and
    a note says so. It is the same model before the first update, and as fast as PEFT's own such adapter, which PEFT
    takes out of the base."""
    lora = request.recipe.lora
    if not lora.starts_from_weights:
        return request, ()
    plain = request.recipe.model_copy(update={"lora": lora.model_copy(update={"init": "default"})})
    note = f"the stock side has lora.init=default, not {lora.init}: its losses agree at step 1 alone"
    return replace(request, recipe=plain), (note,)
