"""Modules that have another name now: importing the old one gives the new one, and says
so.

Old names stay importable until the next minor version.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "mka.arms": ("mka.record.studies",),
    "mka.config": ("mka.record.config", "mka.record.mechanisms", "mka.memory.options"),
    "mka.folders": ("mka.record.folders",),
    "mka.generation": ("mka.models.generation",),
    "mka.limits": ("mka.errors", "mka.memory.options"),
    "mka.loading": ("mka.models.loading",),
    "mka.observations": ("mka.record.results",),
    "mka.results": ("mka.record.results",),
    "mka.statistics": ("mka.record.intervals",),
}
"""Old names, and the modules that have what was there."""


class Finder(MetaPathFinder, Loader):
    """Asked only for what no file of that name answers to."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: Any = None
    ) -> ModuleSpec | None:
        """A spec for an old name; None for every other."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The new module itself, or, where there are several, one that looks into each
        of them."""
        places = MOVED[spec.name]
        warnings.warn(
            f"{spec.name} is {' and '.join(places)} now", DeprecationWarning, stacklevel=4
        )
        found = [importlib.import_module(place) for place in places]
        module = ModuleType(spec.name)

        def look(name: str) -> Any:
            for place in found:
                if hasattr(place, name):
                    return getattr(place, name)
            raise AttributeError(f"module {spec.name!r} has no attribute {name!r}")

        vars(module)["__getattr__"] = look
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do; from now on the old name is the one new module, if it
        is one."""
        places = MOVED[module.__name__]
        if len(places) == 1:
            sys.modules[module.__name__] = sys.modules[places[0]]


def remember() -> None:
    """Let old names be found, after everything else was tried."""
    if not any(type(finder).__name__ == Finder.__name__ for finder in sys.meta_path):
        sys.meta_path.append(Finder())
