"""Keys of config.json have an effect where the architecture's stock code reads them, and nowhere else."""

from types import SimpleNamespace

import pytest

from launcher.errors import RecipeError
from launcher.model.family_choice import family_of
from tests.support.family_figures import LOCAL, MIXED, config_of, differences

pytestmark = pytest.mark.usefixtures("one_thread")

WHOLE = ["full_attention"] * 4
KEYS = [LOCAL, MIXED, {"logits_scaling": 8.0}, {"final_logit_softcapping": 1.0}, {"attn_logit_softcapping": 1.0}]


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        *(("llama", change) for change in KEYS),
        ("granite", LOCAL),
        ("granite", MIXED),
        ("olmo2", LOCAL),
        ("qwen3", {"final_logit_softcapping": 2.0}),
        ("gemma3_text", {"attn_logit_softcapping": 1.0}),
        ("mistral", MIXED),
        ("phi3", MIXED),
        ("smollm3", {**LOCAL, "use_sliding_window": True}),
        ("smollm3", {**MIXED, "use_sliding_window": False}),
    ],
)
def test_a_key_that_the_stock_code_of_a_family_does_not_read_changes_nothing_here_either(model_type, changes):
    loss, gradients = differences(config_of(model_type, **changes))
    assert loss < 1e-5 and max(gradients.values()) < 1e-4


WINDOWED = [("exaone4", MIXED), ("cohere2", LOCAL), ("starcoder2", LOCAL)]


@pytest.mark.parametrize(("model_type", "changes"), WINDOWED)
def test_a_window_that_documents_may_fill_is_refused_of_a_model_without_a_row_with_the_length_to_set(
    model_type, changes
):
    config = config_of(model_type, **changes)
    assert not family_of(config, max_length=4, auto=True).named
    with pytest.raises(RecipeError, match=r"data.max_length, 5; .* has one of 4 tokens.\nSet data.max_length=4 "):
        family_of(config, max_length=5, auto=True)


def test_a_window_that_the_class_of_a_config_does_not_declare_or_no_layer_has_is_no_window():
    for model_type, changes in (("glm", LOCAL), ("arcee", LOCAL), ("exaone4", {**LOCAL, "layer_types": WHOLE})):
        assert not family_of(config_of(model_type, **changes), max_length=5, auto=True).named


def test_what_config_json_leaves_out_is_not_asked_for():
    assert not family_of(SimpleNamespace(model_type="helium"), max_length=5, auto=True).named
