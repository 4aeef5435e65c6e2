"""Ingestion as jobs: documents are accepted at once, and worked on in the background.

The main rule: what was accepted is on the disk, bytes and job alike, before the client hears of it. A document and the
note that its job has done it are one transaction, so a process that dies at any moment loses no upload, does none
twice, and goes on where it was.
"""

from retrieval.jobs.links import LINK
from retrieval.jobs.nouns import Entry, Failure, Item, Job, Limits, Plan, Tally
from retrieval.jobs.queue import Accepted, Ingestion

__all__ = ["LINK", "Accepted", "Entry", "Failure", "Ingestion", "Item", "Job", "Limits", "Plan", "Tally"]
