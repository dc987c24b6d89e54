"""Modules that have another name now: importing the old one gives the new one, and says
so.

Old names stay importable until the next minor version.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "mka.arms": ("mka.record.studies",),
    "mka.audit_commands": ("mka.cli.audit",),
    "mka.commands": ("mka.cli.text", "mka.cli.memory", "mka.cli.benchmark", "mka.cli.evaluate"),
    "mka.config": ("mka.record.config", "mka.record.mechanisms", "mka.memory.options"),
    "mka.evaluation.foreign": ("mka.audit.foreign",),
    "mka.evaluation.leaks": ("mka.audit.module",),
    "mka.experiments.afterwards": ("mka.experiments.costs",),
    "mka.experiments.launch": ("mka.experiments.environment",),
    "mka.experiments.neighbours": ("mka.experiments.environment",),
    "mka.experiments.original": ("mka.audit.original",),
    "mka.experiments.original_model": ("mka.audit.original_model",),
    "mka.experiments.tracking": ("mka.experiments.progress",),
    "mka.folders": ("mka.record.folders",),
    "mka.generation": ("mka.models.generation", "mka.cli.text"),
    "mka.limits": ("mka.errors", "mka.memory.options"),
    "mka.loading": ("mka.models.loading",),
    "mka.model_commands": ("mka.cli.text",),
    "mka.models.budgets": ("mka.experiments.budgets",),
    "mka.models.loss": ("mka.models.reading",),
    "mka.observations": ("mka.record.results",),
    "mka.remembering": ("mka.cli.memory",),
    "mka.report.conditions": ("mka.report.facts",),
    "mka.report.write": ("mka.report.page",),
    "mka.results": ("mka.record.results",),
    "mka.statistics": ("mka.record.intervals",),
    "mka.training.answers": ("mka.training.minimize",),
    "mka.training.costs": ("mka.training.step_memory",),
    "mka.verifying": ("mka.record.verify",),
}
"""Old names, and the modules that have what was there."""
RENAMED = {
    "mka.experiments.neighbours": {"Neighbours": "Neighbors"},
    "mka.generation": {"chat": "run_chat", "generate": "run_generate"},
    "mka.remembering": {
        "add": "run_add",
        "remove": "run_remove",
        "show": "run_list",
        "verify": "run_verify",
    },
}
"""Of each old module, the functions that have another name now."""


class Former(ModuleType):
    """An old module whose names are in several new ones, or have changed: what is read
    and set here is read and set there."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        places = [importlib.import_module(place) for place in MOVED[name]]
        names = {each for place in places for each in vars(place) if not each.startswith("_")}
        vars(self)["_places"], vars(self)["_before"] = places, {}
        vars(self)["__all__"] = sorted(names | set(RENAMED.get(name, ())))

    def _place_of(self, name: str) -> tuple[ModuleType, str]:
        now = RENAMED.get(self.__name__, {}).get(name, name)
        for place in vars(self)["_places"]:
            if hasattr(place, now):
                return place, now
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __getattr__(self, name: str) -> Any:
        place, now = self._place_of(name)
        return getattr(place, now)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__"):
            super().__setattr__(name, value)
            return
        place, now = self._place_of(name)
        vars(self)["_before"].setdefault(name, getattr(place, now))
        setattr(place, now, value)

    def __delattr__(self, name: str) -> None:
        # As when a patch ends: what was set here before is gone, not the name.
        setattr(*self._place_of(name), vars(self)["_before"].pop(name))

    def __dir__(self) -> list[str]:
        return vars(self)["__all__"]


class Finder(MetaPathFinder, Loader):
    """Asked only for what no file of that name answers to."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: Any = None
    ) -> ModuleSpec | None:
        """A spec for an old name; None for every other."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module that leads to the new ones."""
        now = " and ".join(MOVED[spec.name])
        # Of whoever imports it: frames of the import itself are not counted.
        warnings.warn(f"{spec.name} is {now} now", DeprecationWarning, stacklevel=2)
        return Former(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do; from now on the old name is the one new module, if it
        is one."""
        places = MOVED[module.__name__]
        if len(places) == 1 and module.__name__ not in RENAMED:
            sys.modules[module.__name__] = sys.modules[places[0]]


def former(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a package, in which some functions have another name now.

    names: the new name of each old one.
    """

    def look(name: str) -> Any:
        """The function of an old name, with a warning."""
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        warnings.warn(f"{package}.{name} is {names[name]} now", DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[package], names[name])

    return look


def remember() -> None:
    """Let old names be found, after everything else was tried."""
    if not any(type(finder).__name__ == Finder.__name__ for finder in sys.meta_path):
        sys.meta_path.append(Finder())
