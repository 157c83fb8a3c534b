"""completion=bash and completion=zsh: a script that completes the command line, written from the schema.

The script asks nothing of this program, which takes a second to start: keys, choices and recipe names are in its text.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from launcher.errors import RecipeError
from launcher.recipe.command_line import MODES, OPTIONS, closest, echoed
from launcher.recipe.field_types import recipe_names
from launcher.recipe.fields import LEAVES, field
from launcher.recipe.own_recipe import OWN_RECIPES
from launcher.recipe.run_options import OPTIONS_OF

FILES = "./"  # among the words of a value: complete the names of files

SHARED_FUNCTION = """\
# Completion of qlora-launcher, written by `qlora-launcher completion=@SHELL@`: write it again after an update.
# What may stand behind KEY=, or without a key the keys there are, on the command line LINE. "./" stands for files.
_qlora_launcher_words() {  # KEY LINE
  case "$1 $2 " in
@CASES@
  esac
}
"""
BASH = """
_qlora_launcher() {
  local line=${COMP_LINE:0:COMP_POINT}
  local word=${line##*[[:space:]]} key value cut= reply
  COMPREPLY=()
  if [[ $word != *=* ]]; then
    compopt -o nospace
    COMPREPLY=($(compgen -W "$(_qlora_launcher_words "" "$line")" -- "$word"))
    return
  fi
  key=${word%%=*} value=${word#*=}
  local words=" $(_qlora_launcher_words "$key" "$line") "
  mapfile -t COMPREPLY < <(compgen -W "${words/ .\\/ / }" -- "$value")
  if [[ $words == *" ./ "* ]]; then
    compopt -o filenames
    mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(compgen -f -- "$value")
  fi
  # Readline replaces what follows the last of these characters, which end a word for it, if the user has left them.
  local breaks=${COMP_WORDBREAKS//[^=:@]/}
  [[ $breaks ]] && cut=${word%"${word##*[$breaks]}"}
  for reply in "${!COMPREPLY[@]}"; do
    COMPREPLY[reply]=$key=${COMPREPLY[reply]}
    COMPREPLY[reply]=${COMPREPLY[reply]#"$cut"}
  done
}
complete -F _qlora_launcher qlora-launcher
"""
ZSH = """
_qlora_launcher() {
  if [[ $PREFIX != *=* ]]; then
    compadd -S '' -- ${=$(_qlora_launcher_words "" "$words")}
    return
  fi
  local -a values=(${=$(_qlora_launcher_words "${PREFIX%%=*}" "$words")})
  compset -P 1 '*='
  compadd -- ${values:#./}
  (( ${values[(Ie)./]} )) && _files
}
compdef _qlora_launcher qlora-launcher
"""
SHELLS = {"bash": SHARED_FUNCTION + BASH, "zsh": "#compdef qlora-launcher\n" + SHARED_FUNCTION + ZSH}


def completion_script(shell: str) -> str:
    """The script of a key of SHELLS. Raises RecipeError for another shell."""
    if shell not in SHELLS:
        remedy = f"try completion={closest(shell, SHELLS) or 'bash'}"
        raise RecipeError(f"completion must be one of {', '.join(SHELLS)}; got {echoed(shell)}; {remedy}")
    cases = "\n".join(f'    {pattern}) echo "{words}" ;;' for pattern, each in _cases() if (words := " ".join(each)))
    return SHELLS[shell].replace("@SHELL@", shell).replace("@CASES@", cases)


def _cases() -> Iterator[tuple[str, Iterable[str]]]:
    """Each pattern of "KEY LINE " and the words for it; the first that matches counts."""
    yield '"from "*', [*recipe_names(), FILES]
    forms: dict[str, Any] = {f"mode={mode}": options for mode, options in OPTIONS_OF.items()}
    for form, options in (forms | {f"recipe={word}": own for word, own in OWN_RECIPES.items()}).items():
        schemas = options.model_json_schema()["properties"]
        yield f'" "*" {form} "*', [f"{key}=" for key in schemas] + (["report="] if form in forms else [])
        for key, schema in schemas.items():
            yield f'"{key} "*" {form} "*', _words(schema)
    yield '" "*', [*(f"{key}=" for key in (*OPTIONS, *LEAVES)), "completion=", "--help", "--version"]
    yield '"recipe "*', ["list", *OWN_RECIPES, *recipe_names(), FILES]
    yield '"mode "*', MODES
    yield '"report "*', [FILES]
    yield '"model.name "*', [FILES]
    yield '"completion "*', SHELLS
    yield from ((f'"{leaf} "*', _words(field(leaf))) for leaf in LEAVES)


def _words(schema: dict[str, Any]) -> Iterator[str]:
    """The choices of a value and what its examples are; FILES where one of them is a path."""
    yield from schema.get("enum", [schema["const"]] if "const" in schema else ())
    if schema.get("type") == "boolean":
        yield from ("true", "false")
    for branch in (*schema.get("anyOf", ()), *filter(None, [schema.get("items")])):
        yield from _words(branch)
    examples = [example for example in schema.get("examples", ()) if isinstance(example, str)]
    yield from (example for example in examples if example.isalnum())
    if any(example.startswith(FILES) for example in examples):
        yield FILES
