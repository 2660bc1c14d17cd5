"""The doctor: what is wrong, or only looks right, with a pruned model, its optimizer and its statistics.

A finding comes from a check: a short function that looks at a `Patient` and yields what it finds. To add one, write it
with `@pu.doctor.checks`; nothing else has to change. What is examined is never changed, not even a mask that is due to
move.
"""

from . import illnesses
from .examine import CHECKS, SEVERITIES, Finding, Findings, Patient, check, checks

__all__ = ["CHECKS", "SEVERITIES", "Finding", "Findings", "Patient", "check", "checks", "illnesses"]
