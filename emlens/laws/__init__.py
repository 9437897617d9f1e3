"""em.doctor: the laws that must hold of any model before its activations are believed. Tests run them, and so do users.

A law is a number measured on the model at hand, a tolerance, and what to do when it is broken. Nothing is assumed of a family: where blocks
were found by structure, these laws decide whether to trust it.
"""

from .examine import ENGINE_LAWS, LAWS, doctor
from .families import family_table, family_text
from .law import COLUMNS, Law
from .patient import DoesNotApply, Patient
from .text import as_json, as_text, whole

__all__ = ["COLUMNS", "ENGINE_LAWS", "LAWS", "DoesNotApply", "Law", "Patient", "as_json", "as_text", "doctor", "family_table", "family_text", "whole"]
