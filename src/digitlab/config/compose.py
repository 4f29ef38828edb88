"""The edge where the configuration that Hydra composes becomes typed objects."""

import contextlib
import dataclasses
import io
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from digitlab.base.errors import UserError, nearest
from digitlab.base.paths import ROOT
from digitlab.config.recorded import (
    config_from_plain,
    config_to_plain,
    explain,
    flat,
    with_values,
)
from digitlab.config.types import Config


@dataclasses.dataclass(frozen=True)
class Composed:
    """A configuration and the overrides that it was composed with."""

    config: Config
    overrides: tuple[str, ...]


def compose(command: str, arguments: Sequence[str]) -> list[Composed]:
    """Run `digitlab <command>` as a Hydra application up to its configuration.

    Args:
        command: train or sweep; sweep takes ranges in Hydra's sweep grammar as its search space.
        arguments: Hydra's flags and overrides.

    Returns:
        One configuration; several with --multirun; none where a flag such as --cfg only prints.

    Raises:
        UserError: an override that does not parse, or does not fit the types and limits.
    """
    arguments = list(arguments)
    fixed: list[str] = []
    if command == "sweep":
        arguments, fixed = _split_space(arguments)
    jobs: list[tuple[Any, tuple[str, ...]]] = []

    @hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
    def application(config: DictConfig) -> None:
        plain = OmegaConf.to_container(config, resolve=True)
        jobs.append((plain, tuple(HydraConfig.get().overrides.task)))

    overrides = [a for a in arguments if a[:1] == "~" or ("=" in a and a[:1] != "-")]
    flags = [a for a in arguments if a not in overrides]  # first, or argparse takes offence
    for override in overrides:
        try:
            OverridesParser.create().parse_override(override)
        except HydraException as error:
            raise UserError(f"{override}: not understood ({_explain(error)})") from error
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise here what Hydra would print with a traceback
    before = sys.argv
    try:
        with tempfile.TemporaryDirectory() as folder:  # for the file that --multirun writes
            own = [_SEARCH_PATH, f"hydra.sweep.dir='{folder}'"]
            sys.argv = [f"digitlab {command}", *flags, *overrides, *own]
            with contextlib.redirect_stderr(io.StringIO()):  # argparse's usage, many lines
                application()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error)) from error
    except ValueError as error:  # of Hydra's, and names no key
        raise UserError(f"{' '.join(overrides)}: {_explain(error)}") from error
    except SystemExit as end:
        if end.code:
            told = f"{' '.join(flags)}: Hydra does not take this: see digitlab {command} --help"
            raise UserError(told) from end
        raise
    finally:
        sys.argv = before
    composed = []
    for plain, used in jobs:
        space = plain["study"].get("space")
        if isinstance(space, dict):
            plain["study"]["space"] = {k: v for k, v in space.items() if k not in fixed}
        composed.append(Composed(config_from_plain(plain), used))
    return composed


_SEARCH_PATH = f"hydra.searchpath=['file://{ROOT}']"  # makes experiments/ a group


def _split_space(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Turn sweep overrides into entries of study.space; also name the keys that are fixed."""
    parser = OverridesParser.create()
    kept, fixed = [], []
    for argument in arguments:
        if argument.startswith("-") or "=" not in argument:
            kept.append(argument)
            continue
        try:
            override = parser.parse_override(argument)
        except HydraException as error:
            raise UserError(_explain(error)) from error
        knob = override.key_or_group
        if override.is_sweep_override():
            text = argument.split("=", 1)[1]
            # Hydra takes a backslash literally but before a quote, where it must be doubled.
            text = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
            text = re.sub(r"\\+$", lambda found: found[0] * 2, text)
            kept.append(f"++study.space={{{knob}:'{text}'}}")
        else:
            kept.append(argument)
            fixed.append(knob)
    return kept, fixed


def override_values(overrides: Sequence[str]) -> dict[str, Any]:
    """Dotted keys and values of overrides in Hydra's grammar, for `with_values`.

    Raises:
        UserError: one does not parse, or is more than a value for a key.
    """
    values = {}
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise UserError(f"{text}: not understood ({_explain(error)})") from error
        if override.type is not OverrideType.CHANGE or override.is_sweep_override():
            raise UserError(f"{text}: a recorded configuration takes one value for a key it has")
        values[override.key_or_group] = override.value()
    return values


def _explain(error: BaseException) -> str:
    """One line of an error of Hydra's; the nearest key for one that does not exist."""
    text = explain(error)
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        key = unknown[1]
        default = with_values(compose("train", [])[0].config, {"study.space": {}})
        known = flat(config_to_plain(default))
        return f"{key}: no such key in the configuration, {nearest(key, known)}"
    return text
