"""What can only be checked with torch, still before the data is prepared and the model is loaded."""

from functools import partial

import torch

from launcher.checkpoint.folder import RunFolder
from launcher.compile.graphs import check_graphs
from launcher.data.read.sources import open_source
from launcher.memory.policy import check_policy
from launcher.model.build import check_model
from launcher.model.load import load_config, load_tokenizer
from launcher.model.token_ids import token_ids_of
from launcher.preflight.before_torch import run_folder
from launcher.preflight.lines import Checks
from launcher.preflight.machine import check_bitsandbytes, check_compiler, check_device
from launcher.preflight.space import check_disk, check_folders, check_memory
from launcher.runtime.ranks import RankInfo
from launcher.train.inputs import choose_device
from launcher.train.optim import check_optimizer
from launcher.train.request import Request


def check_before_load(request: Request) -> None:
    """What a run checks in each process, for its own device. Raises all that fails as one error."""
    checks = Checks()
    check_with_torch(checks, request, [request.rank_info])
    checks.refuse(local_rank=request.rank_info.local_rank)


def check_with_torch(
    checks: Checks, request: Request, ranks: list[RankInfo], *, folder: RunFolder | None = None
) -> None:
    """Check the devices of these processes of one machine, and that model, tools and disk suffice for them. `folder`:
    of the run to come; None: of one started now."""
    recipe, source = request.recipe, request.source
    devices = [
        checks.add("process", partial(choose_device, rank), found=lambda device: f"on {device}") for rank in ranks
    ]
    usable = [device for device in devices if device and _usable(checks, request, device)]
    checks.add("folders", check_folders)
    if not usable:
        return
    checks.add("compiler", partial(check_compiler, recipe, usable[0]))
    checks.add("recipe on this device", partial(_check_recipe, request, usable[0]), found=lambda _: "can be run")
    config = checks.add("config.json", partial(load_config, source, recipe.model), found=lambda found: found.model_type)
    if config is None:
        return
    weights = "random, none are read" if recipe.model.init == "random" else source
    model = checks.add("weights", partial(check_model, recipe, source, config, usable[0]), found=lambda _: weights)
    if model is None:
        return
    checks.add("disk", partial(check_disk, recipe, source, model, folder or run_folder(recipe, request.name)))
    for device in usable:
        checks.add("memory", partial(check_memory, recipe, config, model, device), own=True)


def check_sources(checks: Checks, request: Request) -> None:
    """Check what a run finds out anyway as soon as it reads: the tokenizer, and datasets of the hub."""
    model, data, tokens = request.recipe.model, request.recipe.data, request.recipe.lora.trainable_tokens
    load = partial(load_tokenizer, request.source, model, stand_in=request.shipped / "tiny" / "base")
    tokenizer = checks.add("tokenizer", load, found=lambda tokenizer: f"{len(tokenizer):,} tokens")
    if tokens and tokenizer is not None:
        vocabulary = load_config(request.source, model).vocab_size
        ids_of = partial(token_ids_of, tokens, tokenizer, vocabulary=vocabulary)
        checks.add("trained tokens", ids_of, found=lambda ids: f"ids {', '.join(map(str, ids))}")
    for source in data.sources:
        checks.add("source", partial(open_source, source, data=data), found=lambda opened: opened.feeds[0].name)
    if validation := data.validation_source:
        opens = partial(open_source, validation, data=data, validates=True)
        checks.add("validation source", opens, found=lambda opened: opened.feeds[0].name)


def _usable(checks: Checks, request: Request, device: torch.device) -> bool:
    """Check one device, and bitsandbytes on it where it can be used at all."""
    if checks.add("device", partial(check_device, device), own=True) is None:
        return False
    checks.add("bitsandbytes", partial(check_bitsandbytes, request.recipe, device), own=True)
    return True


def _check_recipe(request: Request, device: torch.device) -> None:
    check_optimizer(request.recipe.train, device)
    check_graphs(request.recipe.compile, device)
    check_policy(request.recipe, device)
