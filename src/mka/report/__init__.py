"""results.jsonl -> tables and figures. Never imports torch.

summary     one `Summary` a mechanism: mean and spread over seeds
tables      Markdown and terminal tables, and the lines printed after each mechanism
curves      several seeds' curves -> one to draw
differences each mechanism against mha on the same held-out blocks
labels      where the names of points go
style       how every figure looks, and how it is saved
figures     loss against tokens and time, perplexity against cache
conditions  the configuration and environments of a run, in Markdown
write       the run folder's table.md and figures/
runs        run folders as the page reads them
charts      what the page's charts show; svg draws them
routers     heat maps, and a passage with the level that served each token
warnings    what a reader must know before believing a figure
facts       the command, the data, the machine
page        all of it -> one HTML page, and the same as Markdown; templates/ has their forms
"""

from mka.report.differences import Difference, differences
from mka.report.figures import save_figures
from mka.report.page import write_pages
from mka.report.runs import read_runs
from mka.report.summary import Mean, Summary, latest, summarise
from mka.report.tables import console_table, markdown_table, result_lines
from mka.report.write import write_report

__all__ = [
    "Difference",
    "Mean",
    "Summary",
    "console_table",
    "differences",
    "latest",
    "markdown_table",
    "read_runs",
    "result_lines",
    "save_figures",
    "summarise",
    "write_pages",
    "write_report",
]
