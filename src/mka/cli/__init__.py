"""The command line: flags, printing, exit codes.

Heavy imports are inside functions, so that a mistake is reported at once.

commands   parse, dispatch, exit status
benchmark  bench, report, verify
text       convert, adapt, generate, chat
memory     memory add, list, verify, remove
evaluate   eval perplexity, router, needle, recall, ruler
audit      audit original, module
"""

from mka.cli.commands import bench, main

__all__ = ["bench", "main"]
