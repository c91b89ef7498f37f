"""The imaging room: a hospital's own files in, a clean and patient-safe cohort out."""

from client.imaging.cohort import Cohort, Split, pseudonym
from client.imaging.loading import load
from client.imaging.records import Membership, Quarantined, Reason
from client.imaging.source import Columns, Source

__all__ = ["Cohort", "Columns", "Membership", "Quarantined", "Reason", "Source", "Split", "load", "pseudonym"]
