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
    "mka.audit_commands": ("mka.cli.audit",),
    "mka.commands": ("mka.cli.text", "mka.cli.memory", "mka.cli.benchmark", "mka.cli.evaluate"),
    "mka.config": ("mka.record.config", "mka.record.mechanisms", "mka.memory.options"),
    "mka.evaluation.foreign": ("mka.audit.foreign",),
    "mka.evaluation.leaks": ("mka.audit.module",),
    "mka.evaluation.perplexity": ("mka.evaluation.held_out",),
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
    "mka.training.minimise": ("mka.training.minimize",),
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
    "mka.training.minimise": {"minimise": "minimize"},
}
"""Of each old module, the functions that have another name now."""


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
            name = RENAMED.get(spec.name, {}).get(name, name)
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
        if len(places) == 1 and module.__name__ not in RENAMED:
            sys.modules[module.__name__] = sys.modules[places[0]]


def remember() -> None:
    """Let old names be found, after everything else was tried."""
    if not any(type(finder).__name__ == Finder.__name__ for finder in sys.meta_path):
        sys.meta_path.append(Finder())
