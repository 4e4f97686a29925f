"""Published experiments, each a thin script over the library with one folder of results."""

from refluence.studies.folder import StudyFolder

__all__ = ["StudyFolder"]
