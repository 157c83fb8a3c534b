"""Whole runs at test size: their events, the claims they make, and the ends they can come to."""

import json
import shutil

import pytest

from launcher.errors import RecipeError
from launcher.recipe.load import resolve
from launcher.records.run import EvalRecord, Note, Phase, RunOpened, RunRecord, StartRecord, StepRecord
from launcher.train.history import RunHistory
from launcher.train.loop import training
from launcher.train.state import EarlyStop
from tests.conftest import fresh_dynamo, request_for, small_recipe, stock_loss
from tests.support.runs import events_of, record_of

pytestmark = pytest.mark.usefixtures("clean_dynamo")
STRICT_CLAIMS = [
    "base loaded whole", "zero graph breaks", "zero recompiles", "exactly the planned graphs",
    "every step ran compiled", "saved adapter reloads",
]  # fmt: skip


def losses(recipe):
    return [step.loss for step in record_of(recipe).steps]


@pytest.fixture(scope="module")
def finished(small_model, rows_file, tmp_path_factory):
    """The events and the history of a run of six steps that evaluates every third."""
    recipe = small_recipe(
        small_model, rows_file, tmp_path_factory.mktemp("finished"), train={"steps": 6, "eval_every": 3}
    )
    history = RunHistory()
    with fresh_dynamo():
        return events_of(recipe, history), history


@pytest.fixture(scope="module")
def plain_losses(small_model, rows_file, tmp_path_factory):
    """The losses of the default recipe, uncompiled."""
    with fresh_dynamo():
        return losses(small_recipe(small_model, rows_file, tmp_path_factory.mktemp("plain"), compile={"mode": "off"}))


def test_a_run_yields_its_folder_start_steps_evals_and_record_in_order(finished):
    events, history = finished
    folder = history.worker.folder.path
    records = [event for event in events if not isinstance(event, str | Phase)]
    steps = [StepRecord] * 3
    kinds = [
        RunOpened,
        StartRecord,
        EvalRecord,
        Note,
        *steps,
        EvalRecord,
        *steps,
        EvalRecord,
        RunRecord,
    ]  # an untrained base
    assert [type(record) for record in records] == kinds
    assert records[0].path == folder
    assert [record.step for record in records if isinstance(record, EvalRecord)] == [0, 3, 6]
    assert [record.step for record in records if isinstance(record, StepRecord)] == [1, 2, 3, 4, 5, 6]
    # The rest is sinks'.
    assert {path.name for path in folder.iterdir()} == {"adapter", "checkpoints", "metrics.jsonl", "parts.json"}
    assert [part["last_step"] for part in json.loads((folder / "parts.json").read_text())] == [6]
    phases = [event if isinstance(event, str) else event.name for event in events if isinstance(event, str | Phase)]
    assert phases == [
        "reading data", "starting processes", "loading model", "compiling", "saving adapter", "generating the sample",
    ]  # fmt: skip


def test_the_start_says_in_words_which_rows_are_not_seen_whole(finished):
    [start] = [event for event in finished[0] if isinstance(event, StartRecord)]
    [note] = [note for note in start.notes if "truncated" in note]
    assert "rows truncated" in note and "_" not in note


def test_a_run_learns_and_every_claim_holds(finished):
    events, history = finished
    record = events[-1]
    assert record.evals[-1].eval_loss < record.evals[0].eval_loss
    assert [verdict.claim for verdict in record.verdicts if verdict.holds] == STRICT_CLAIMS
    compiled = record.ranks[0].compile
    assert compiled.compilations < 10
    assert compiled.graphs_by_region == {"layer": 2, "loss": 2}
    assert history.worker.state.step == 6
    assert record.adapter == str(history.worker.folder.path / "adapter") and record.no_sample == ""
    assert history.worker.state.early_stop == EarlyStop(best_eval_loss=record.evals[-1].eval_loss)


@pytest.mark.parametrize(
    ("compile", "tolerance"),
    [
        ({"scope": "layer"}, 1e-5),
        ({"scope": "regions"}, 1e-5),
        ({"scope": "model"}, 1e-5),
        ({"backend": "inductor"}, 1e-4),
    ],
)
def test_compiled_losses_equal_the_uncompiled_ones(make_recipe, plain_losses, compile, tolerance):
    assert losses(make_recipe(compile=compile)) == pytest.approx(plain_losses, rel=tolerance)
    assert plain_losses[0] != plain_losses[1]


@pytest.mark.parametrize("region", ["mlp", "rmsnorm", "attention", "loss"])
def test_each_region_compiles_on_its_own(make_recipe, region):
    record = record_of(make_recipe(compile={"scope": "regions", "regions": [region]}, train={"steps": 1}))
    assert record.ranks[0].compile.graphs_by_region == {region: 2}
    assert all(verdict.holds for verdict in record.verdicts)


def test_accumulation_sees_the_same_global_batch_as_one_large_micro_batch(make_recipe, tmp_path):
    def with_shape(name, **train):
        return losses(make_recipe(train=train, compile={"mode": "off"}, run={"output_dir": str(tmp_path / name)}))

    parts = with_shape("parts", micro_batch=1, accumulation=4)
    assert parts == pytest.approx(with_shape("whole", micro_batch=4), rel=1e-5)


def test_the_seed_decides_the_run_and_compiling_draws_no_random_numbers(make_recipe, tmp_path):
    def with_seed(seed, name, mode="strict"):
        run = {"output_dir": str(tmp_path / name)}
        return losses(make_recipe(lora={"dropout": 0.2}, compile={"mode": mode}, train={"seed": seed}, run=run))

    first = with_seed(0, "a")
    assert with_seed(0, "b", mode="off") == pytest.approx(first, rel=1e-5)
    assert with_seed(1, "c", mode="off") != pytest.approx(first, rel=1e-5)


def test_a_short_run_is_never_refused(make_recipe):
    train = {"steps": None, "epochs": 0.1, "warmup": 10, "eval_every": 100, "log_every": 50}
    record = record_of(make_recipe(train=train, compile={"mode": "off"}))
    assert len(record.steps) >= 1
    assert all(verdict.holds for verdict in record.verdicts)


def test_a_run_without_validation_has_no_eval_loss_and_the_same_graphs(make_recipe):
    record = record_of(make_recipe(data={"validation": 0}))
    assert record.evals == ()
    assert record.as_report()["loss"]["eval_first"] is None
    assert record.ranks[0].compile.planned_graphs == 4


@pytest.mark.parametrize(
    ("data", "run", "why"),
    [
        ({}, {"sample_tokens": 0}, "run.sample_tokens=0"),
        ({"validation": 0}, {}, "no row validates (data.validation)"),
        ({"sources": [{"path": "texts.jsonl"}]}, {}, "no validation row is a chat"),
    ],
)
def test_a_run_without_a_sample_says_why_and_has_no_phase_for_it(make_recipe, tmp_path, monkeypatch, data, run, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "the river {n} runs"}}\n' for n in range(40)))
    run = {"output_dir": str(tmp_path / "run"), **run}
    events = events_of(make_recipe(data=data, run=run, compile={"mode": "off"}, train={"steps": 1}))
    assert "generating the sample" not in events
    assert events[-1].sample is None and why in events[-1].no_sample
    assert events[-1].as_report()["no_sample"] == events[-1].no_sample


def test_compiling_tells_how_many_graphs_of_each_region_have_begun(make_recipe):
    seen, history = [], RunHistory()
    events = training(request_for(make_recipe(train={"steps": 1})), history)
    compiling = next(event for event in events if isinstance(event, Phase) and event.name == "compiling")
    assert compiling.progress() == "", "nothing is planned yet"
    observer = history.worker.observer
    observe = observer.backend
    observer.backend = lambda region, inner: observe(
        region, lambda *arguments: seen.append(compiling.progress()) or inner(*arguments)
    )
    list(events)
    assert seen == [f"graphs: layer {layer} of 2, loss {loss} of 2" for layer, loss in ((1, 0), (1, 1), (2, 1), (2, 2))]


def test_reading_the_device_seldom_loses_no_step_and_no_evaluation(make_recipe):
    train = {"steps": 5, "log_every": 3, "eval_every": 2}
    record = record_of(make_recipe(train=train, compile={"mode": "off"}))
    assert [step.step for step in record.steps] == [1, 2, 3, 4, 5]
    assert [evaluation.step for evaluation in record.evals] == [0, 2, 4, 5]


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_model_folder_without_whole_weights_is_refused_before_anything_is_made(
    make_recipe, small_model, tmp_path, damage
):
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    weights = folder / "model.safetensors"
    weights.unlink() if damage == "missing" else weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RecipeError, match="safetensors"):
        events_of(make_recipe(model={"name": str(folder)}))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_shipped_recipe_learns_its_task(tmp_path):
    argv = ["recipe=tiny", "compile.backend=aot_eager", "train.steps=25", f"run.output_dir={tmp_path / 'run'}"]
    record = record_of(resolve(argv).recipe)
    assert record.evals[-1].eval_loss < 0.8 * record.evals[0].eval_loss
    assert all(verdict.holds for verdict in record.verdicts)
    assert record.ranks[0].compile.compilations < 10
    assert "(noun" in record.sample.generated


def test_stock_peft_in_another_process_and_folder_gives_the_trained_loss(finished, tmp_path):
    _, history = finished
    stock = stock_loss(history, tmp_path, dtype="float32", device="cpu")
    assert stock == pytest.approx(history.evals[-1].eval_loss, rel=1e-3)
    assert history.evals[-1].eval_loss != pytest.approx(history.evals[0].eval_loss, rel=1e-3)
