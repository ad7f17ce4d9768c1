"""Which runs are the same method with other seeds, and what a method is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppojax.errors import ConfigError
from ppojax.reporting.runs import Run

ABSENT = "(absent)"
_NEVER = ("seed", "run", "resume")  # tells runs of one method apart
_Key = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Method:
    """Runs whose settings differ in nothing but seed and place."""

    name: str
    runs: tuple[Run, ...]
    tasks: tuple[int, ...]  # of each run: the stratum it is drawn in

    @property
    def stratum_N(self) -> np.ndarray:
        """The stratum of each run."""
        return np.array(self.tasks)

    def only(self, keep: Callable[[Run], bool]) -> Method | None:
        """This method with some of its runs; None where that is none of them."""
        kept = [(run, task) for run, task in zip(self.runs, self.tasks, strict=True) if keep(run)]
        return Method(self.name, tuple(r for r, _ in kept), tuple(t for _, t in kept)) if kept else None


def group(runs: Sequence[Run], tasks: Sequence[str] = (), names: Sequence[str] = ()) -> list[Method]:
    """Group runs into methods, in the order in which they were given.

    Args:
        runs: at least one.
        tasks: settings that tell tasks apart, such as `env`: runs of a method may differ in them.
        names: instead of what is made up from the settings; none, or one for each method.

    Raises ConfigError when the names are not as many as the methods.
    """
    unknown = [task for task in tasks if not any(_in(key, (task,)) for run in runs for key in run.config)]
    if unknown:
        raise ConfigError(f"tasks={unknown[0]}: is no setting of the runs; name one such as env or rollout.mismatch")
    found: dict[_Key, list[Run]] = {}
    for run in runs:
        found.setdefault(_key(run.config, lambda key: not _in(key, (*_NEVER, *tasks))), []).append(run)
    task_of = [_key(run.config, lambda key: _in(key, tasks)) for run in runs]
    stratum = {run.name: task_of.index(task) for run, task in zip(runs, task_of, strict=True)}
    made = _names([dict(key) for key in found])
    if names and (len(names) != len(made) or len(set(names)) != len(names)):
        raise ConfigError(
            f"names={','.join(names)}: expected {len(made)} different names, for: {'; '.join(made)}; or leave it out"
        )
    return [
        Method(name, tuple(own), tuple(stratum[run.name] for run in own))
        for name, own in zip(names or made, found.values(), strict=True)
    ]


def _key(config: Mapping[str, Any], keep: Callable[[str], bool]) -> _Key:
    return tuple((key, config[key]) for key in sorted(config) if keep(key))


def _in(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _names(methods: Sequence[dict[str, Any]]) -> list[str]:
    """Name each by the settings that differ. What a variant alone has says nothing beside the variant's type."""
    if len(methods) == 1:
        return [f"loss.type={methods[0].get('loss', ABSENT)}"]
    keys = list(dict.fromkeys(key for method in methods for key in method))
    names = []
    for method in methods:
        parts = []
        for key in keys:
            above = [".".join(key.split(".")[:n]) for n in range(1, key.count(".") + 1)]
            alike = [other for other in methods if all(_at(other, a) == _at(method, a) for a in above)]
            if key.endswith(".type") or len({repr(_at(other, key)) for other in alike}) < 2:
                continue
            parts.append(_said(key, method, keys))
        names.append(", ".join(parts))
    return names


def _at(method: Mapping[str, Any], key: str) -> Any:
    return method.get(key, ABSENT)


def _said(key: str, method: Mapping[str, Any], keys: Sequence[str]) -> str:
    value = _at(method, key)
    typed = f"{key}.type" in keys and f"{key}.type" in method
    return f"{key}{'.type' if typed else ''}={'null' if value is None else value}"
