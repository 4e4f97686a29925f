"""The report: one self-contained HTML page, and matplotlib pictures for notebooks."""

from refluence.report.page import write_report
from refluence.report.plots import plot_scores, plot_self_influence, plot_share, plot_top
from refluence.report.presentation import Presentation

__all__ = ["Presentation", "plot_scores", "plot_self_influence", "plot_share", "plot_top", "write_report"]
