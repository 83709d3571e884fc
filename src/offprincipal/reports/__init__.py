"""Reports: the tables of a comparison, and the verdicts of a study, in words and as one HTML file."""

from offprincipal.reports.report import write_report, write_report_of
from offprincipal.reports.words import verdict_paragraph

__all__ = ["verdict_paragraph", "write_report", "write_report_of"]
