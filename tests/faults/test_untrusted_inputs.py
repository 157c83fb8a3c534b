"""Recipes, models, tokenizers and templates of others are data: each attack here is tried, and nothing of it runs."""

import ast
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from launcher.data.read.rows import RowFault
from launcher.errors import RecipeError
from launcher.model.load import load_config, load_tokenizer
from launcher.recipe.load import resolve
from launcher.recipe.locate import locate
from launcher.recipe.yaml_lines import read_file
from tests.conftest import ROOT, TINY
from tests.support.chats import chat, encode
from tests.support.models import ARCHITECTURES, build
from tests.support.refusals import own_recipe, refused


@pytest.fixture
def planted(tmp_path):
    """A file that is there once code of an attacker has run, and the code that makes it."""
    marker = tmp_path / "planted"
    return marker, f"open({str(marker)!r}, 'w').close()\n"


@pytest.fixture
def own(tmp_path):
    return own_recipe(tmp_path)


# --- recipes


@pytest.mark.parametrize("text", ["${oc.env:SECRET}", "a${train.lr}b", "${oops", "$SECRET", "???", "os._target_"])
def test_fault_04_an_interpolation_is_plain_text_on_both_layers_and_never_resolved(own, monkeypatch, text):
    monkeypatch.setenv("SECRET", "hidden-token")
    own.write_text(f"train: {{steps: 1}}\nmodel: {{name: {text!r}}}\ndata: {{sources: [{{path: {text!r}}}]}}\n")
    resolved = resolve([f"recipe={own}", f"run.output_dir={text}", f"lora.targets=[{text!r}]", f"report={text}"])
    recipe = resolved.recipe
    assert [recipe.model.name, recipe.data.sources[0].path, recipe.run.output_dir, *recipe.lora.targets] == [text] * 4
    assert resolved.report == Path.cwd() / text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  lr: [1\n", "own.yaml:3"),
        ("train:\n\tlr: 1\n", "own.yaml:2"),
        ("a: 1\nb: !!python/object/apply:os.system ['touch planted']\n", "own.yaml:2"),
        ("a: !!python/object/new:os.system ['touch planted']\n", "own.yaml:1"),
        ("!!python/name:os.system a: 1\n", "own.yaml:1"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "own.yaml:1: a value that an alias"),
        ("a: {<<: &a {b: 1}}\n", "own.yaml:1"),
        ("a: !own 1\n", "own.yaml:1"),
        ("a: !!binary aGk=\n", "own.yaml:1"),
        ("a: &x [1]\nb: *x\n", "own.yaml:1: a value that an alias"),
        ("a: &x\n  - *x\n", "own.yaml"),
        ("a: 1\nb: 2\na: 3\n", "own.yaml:3: the key 'a' is given twice"),
        ("? [1, 2]\n: 3\n", "own.yaml:1"),
        ("# c\n- 1\n- 2\n", "own.yaml:2"),
        ("just text\n", "own.yaml:1"),
        ("a: 1\n---\nb: 2\n", "own.yaml:2"),
        (b"a: \xff\n", "UTF-8"),
        ("a: \x07\n", "own.yaml"),
        ("a: " + "[" * 2000, "own.yaml"),
        ("a: " + "[" * 100 + "]" * 100, "own.yaml:1: nested too deeply"),
    ],
)
def test_fault_05_what_is_not_a_plain_mapping_is_refused_with_file_and_line(own, monkeypatch, text, expected):
    monkeypatch.chdir(own.parent)
    own.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        read_file(own)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (own.parent / "planted").exists()


@pytest.mark.parametrize("key", ["_target_: os.system", "model: {_target_: os.system, _args_: [touch planted]}"])
def test_fault_04_a_target_is_an_unknown_key_and_nothing_is_called(own, monkeypatch, key):
    monkeypatch.chdir(own.parent)
    own.write_text(f"train: {{steps: 1}}\n{key}\n")
    assert "unknown key" in refused(f"recipe={own}") and "_target_" in refused(f"recipe={own}")
    assert not (own.parent / "planted").exists()


# --- models and tokenizers


def test_fault_09_a_model_that_needs_its_own_code_is_refused_and_nothing_is_imported(make_recipe, tmp_path, planted):
    marker, code = planted
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}))
    (tmp_path / "mine.py").write_text(code)
    recipe = make_recipe(model={"name": str(tmp_path)})
    with pytest.raises(RecipeError, match="without remote code"):
        load_config(locate(recipe.model, ARCHITECTURES), recipe.model)
    assert not marker.exists()


CODE = {  # file of a model's folder -> keys that name code beside it
    "config.json": {"auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}},
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}},
    "generation_config.json": {"custom_generate": "mine", "trust_remote_code": True},
}


class Bomb:
    """Unpickled, it runs code."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


@pytest.fixture
def hostile(small_model, tmp_path, planted):
    """A model that is whole, in a folder with code and pickles wherever a library might look for them."""
    _, code = planted
    folder = tmp_path / "hostile"
    shutil.copytree(small_model, folder)
    for name, keys in CODE.items():
        file = folder / name
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(content | keys))
    for name in ("mine.py", "modeling_llama.py", "tokenization.py", "__init__.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Bomb(code)))
        torch.save(Bomb(code), folder / f"zipped-{name}")
    return folder


def test_fault_09_code_and_pickles_beside_a_whole_model_are_left_alone(hostile, make_recipe, planted, monkeypatch):
    monkeypatch.setenv("HF_HUB_TRUST_REMOTE_CODE", "1")
    recipe = make_recipe(model={"name": str(hostile)})
    before = {*sys.path}
    load_tokenizer(str(hostile), recipe.model, stand_in=TINY / "base")
    assert build(recipe).family.model_type == "llama"
    assert not planted[0].exists() and {*sys.path} == before
    pickle.loads(pickle.dumps(Bomb(planted[1])))
    assert planted[0].exists(), "the bomb is one"


def test_fault_09_a_tokenizer_that_needs_its_own_code_is_refused_and_nothing_is_imported(hostile, make_recipe, planted):
    file, recipe = hostile / "tokenizer_config.json", make_recipe(model={"name": str(hostile)})
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "Mine"}))
    with pytest.raises(RecipeError, match="must come with a tokenizer"):
        load_tokenizer(str(hostile), recipe.model, stand_in=TINY / "base")
    assert not planted[0].exists()


@pytest.mark.parametrize("disguise", ["pytorch_model.bin", "model.safetensors", "model.safetensors.index.json"])
def test_fault_09_pickled_weights_are_refused_under_any_name(hostile, make_recipe, planted, disguise):
    (hostile / "model.safetensors").unlink()
    if disguise == "model.safetensors":
        shutil.copy(hostile / "pytorch_model.bin", hostile / disguise)
    if disguise.endswith(".json"):
        names = {"model.embed_tokens.weight": "pytorch_model.bin", "model.norm.weight": "zipped-pytorch_model.bin"}
        (hostile / disguise).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(RecipeError):
        build(make_recipe(model={"name": str(hostile)}))
    assert not planted[0].exists()


TRUSTING = ("from_pretrained", "from_config", "load_dataset", "load_dataset_builder", "pipeline")
TAKE_NO_CODE = (
    "GenerationConfig.from_pretrained",
    "PeftModel.from_pretrained",
    "PeftConfig.from_pretrained",
    "datasets.load_dataset_builder",
)  # since datasets 4 no dataset has code
EXECUTING = {
    "eval", "exec", "__import__", "torch.load", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "os.system", "marshal.loads", "dill.load", "joblib.load", "np.load", "numpy.load",
}  # fmt: skip


def unsafe_calls(package):
    """Calls that leave it to a library whether a model's code is run, or that run what they read."""
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            trusted = [ast.unparse(word.value) for word in node.keywords if word.arg == "trust_remote_code"]
            if name in EXECUTING or "True" in trusted:
                yield f"{path.name}: {name}"
            elif name.rsplit(".")[-1] in TRUSTING and trusted != ["False"] and name not in TAKE_NO_CODE:
                yield f"{path.name}: {name} without trust_remote_code=False"


def test_every_loader_is_told_to_trust_no_code_and_nothing_that_is_read_can_execute(tmp_path):
    assert list(unsafe_calls(ROOT / "launcher")) == []
    (tmp_path / "a.py").write_text("AutoConfig.from_pretrained(x)\nA.from_config(c, trust_remote_code=True)\n")
    (tmp_path / "b.py").write_text("torch.load(f)\nyaml.load(f)\nA.from_config(c, trust_remote_code=False)\n")
    assert len(list(unsafe_calls(tmp_path))) == 4


# --- chat templates

ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('PLANT') }}",
    "{{ self._TemplateReference__context.eval_ctx.environment.__class__ }}",
    "{{ raise_exception.__globals__['__builtins__']['exec']('PLANT') }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ '{a.__class__.__base__}'.format_map({'a': messages}) }}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{{ lipsum.__globals__['os'].popen('PLANT').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ messages.__class__.__init__.__globals__ }}",
)


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_that_reaches_out_of_its_sandbox_is_a_fault_of_the_row_and_runs_nothing(planted, template):
    marker, code = planted
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    tokenizer.chat_template = template.replace("PLANT", code.strip().replace("'", '"'))
    with pytest.raises((RowFault, RecipeError)) as caught:
        encode(tokenizer, chat("user: a", "assistant: b"), loss_on="all")
    assert "root:" not in str(caught.value) and not marker.exists()


def test_a_template_sees_neither_the_environment_nor_the_modules(monkeypatch):
    monkeypatch.setenv("CANARY_VALUE", "in-the-environment")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    names = ("os", "sys", "environ", "env", "builtins", "open", "config", "request", "tokenizer", "self.environment")
    tokenizer.chat_template = "".join(f"[{{{{ {name} is defined }}}}]" for name in names) + "{{ messages[0].content }}"
    [document] = encode(tokenizer, chat("user: CANARY_VALUE", "assistant: b"), loss_on="all")
    assert tokenizer.decode(document.input_ids).count("[False]") == len(names)
