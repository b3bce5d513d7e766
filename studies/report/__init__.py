"""`autosft report`: a study as one HTML file that needs no network.

`facts` gathers what is shown, `figures` draws it as plotly's plain JSON, `page` puts it on a page.
"""

from __future__ import annotations

from autosft.studies.report.facts import Answer, StudyReport, report_of
from autosft.studies.report.page import render, write_report

__all__ = ["Answer", "StudyReport", "render", "report_of", "write_report"]
