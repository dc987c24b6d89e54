"""Whether reported numbers can be trusted: leak tests of attention modules, and what
the defects of the original protocol do.

The functions return dataclasses; `mka audit` prints them.
"""

from mka.audit.foreign import ForeignModule, build_foreign
from mka.audit.module import Finding, audit_module
from mka.audit.original import Protocol, ProtocolScore, original_scores

__all__ = [
    "Finding",
    "ForeignModule",
    "Protocol",
    "ProtocolScore",
    "audit_module",
    "build_foreign",
    "original_scores",
]
