"""results.jsonl -> tables and figures. Never imports torch.

summary     one `Summary` a mechanism: mean and spread over seeds
tables      Markdown and terminal tables, and the lines printed after each mechanism
differences each mechanism against mha on the same held-out blocks
runs        run folders as the page reads them
charts      what is drawn: points with their words
drawing     charts -> Vega-Lite -> SVG, for files and page
routers     heat maps, and a passage with the level that served each token
warnings    what a reader must know before believing a figure
facts       the command, the data, the machine, the configuration
page        all of it -> a folder's table.md and figures/, one HTML page, and the same as
            Markdown; templates/ has their forms
"""

from mka.moved import former
from mka.report.differences import Difference, differences
from mka.report.page import save_figures, write_pages, write_report
from mka.report.runs import read_runs
from mka.report.summary import Mean, Summary, latest, summarize
from mka.report.tables import console_table, markdown_table, result_lines

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
    "summarize",
    "write_pages",
    "write_report",
]

__getattr__ = former("mka.report", {"summarise": "summarize"})
