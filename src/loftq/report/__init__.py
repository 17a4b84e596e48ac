"""What a plan costs, what an output or a run holds, and whether this machine can use it."""

from loftq.report.doctor import Check, doctor
from loftq.report.html import ReportError, write_report
from loftq.report.inspect import InspectReport, inspect_output
from loftq.report.planned import PlanReport, describe_plan

__all__ = [
    "Check",
    "InspectReport",
    "PlanReport",
    "ReportError",
    "describe_plan",
    "doctor",
    "inspect_output",
    "write_report",
]
