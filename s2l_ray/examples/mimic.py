"""Radiology reports of MIMIC-III: findings to be summarised as an impression, out of the table of all notes.

`NOTEEVENTS.csv` (or `.csv.gz`) is read as a stream, 2 million notes one after the other; what is kept are the reports with both
sections. Of the text, page breaks are taken out, what was replaced for privacy (`[**...**]`) becomes `___`, and a section is
one paragraph. The first findings count, and the first impression after them: provisional readings before the final report and
addenda with an impression of their own do not.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from s2l_ray.errors import DataError
from s2l_ray.examples.files import BYTE_ORDER_MARK
from s2l_ray.examples.formats import FilePiece
from s2l_ray.examples.row_problems import ANOTHER_CATEGORY, MARKED_AS_ERROR, NO_FINDINGS, NO_IMPRESSION
from s2l_ray.examples.rows import ROWS_AT_A_TIME, BadRow, CorpusRows, Records

RULES = 1
"""Raised when the same notes give other examples than before."""
COLUMNS = ("ROW_ID", "SUBJECT_ID", "HADM_ID", "CATEGORY", "DESCRIPTION", "ISERROR", "TEXT")

_PAGE_BREAK = re.compile(r"\(Over\).*?\(Cont\)", re.DOTALL)
_REPLACED = re.compile(r"\[\*\*.*?\*\*\]", re.DOTALL)
_FINAL_REPORT = re.compile(r"^[ \t]*FINAL REPORT\b", re.MULTILINE)
_FINDINGS, _IMPRESSION = re.compile(r"FINDINGS?", re.IGNORECASE), re.compile(r"IMPRESSIONS?", re.IGNORECASE)
# Headings that end a section; those of organs and series ("LUNGS:", "CT OF THE HEAD:") stand inside one.
_HEADING = re.compile(
    r"^[ \t]*(?:(?P<name>FINDINGS?(?:[ \t]*(?:AND|&|/)[ \t]*IMPRESSIONS?)?|IMPRESSIONS?|(?:PROVISIONAL|PRELIMINARY)[^\n:]{0,60}"
    r"|CONCLUSIONS?|RECOMMENDATIONS?|INDICATIONS?|(?:CLINICAL[ \t])?HISTORY|CLINICAL[ \t][^\n:]{0,40}|REASON[^\n:]{0,40}"
    r"|COMPARISONS?(?:[ \t]STUD(?:Y|IES))?|TECHNIQUE|EXAM(?:INATION)?|PROCEDURES?|CONTRAST|WET READ|NOTIFICATION"
    r"|(?:FINAL[ \t])?ADDENDUM[^\n:]{0,40}|UNDERLYING MEDICAL CONDITION|ADMITTING DIAGNOSIS)[ \t]*:|_{5,}|FINAL ADDENDUM\b)",
    re.IGNORECASE | re.MULTILINE,
)
# The first that fits a report's description is its source.
_SOURCES = (
    ("CT", re.compile(r"\bCTA?\b")),
    ("MR", re.compile(r"\bMR[AI]?\b")),
    ("ultrasound", re.compile(r"\bUS\b|ULTRASOUND|DUPLEX|DOPPLER|SONO")),
    ("chest x-ray", re.compile(r"CHEST")),
)
OTHER = "other"


def sections(text: str) -> tuple[str, str]:
    """The findings and the impression of a report, each empty where it has none."""
    text = _PAGE_BREAK.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n"))
    final = _FINAL_REPORT.search(text)
    text = text[final.end() :] if final else text
    headings = list(_HEADING.finditer(text))
    starts = [heading.start() for heading in headings] + [len(text)]
    found = [(heading["name"] or "", text[heading.end() : end]) for heading, end in zip(headings, starts[1:], strict=True)]
    first = next((i for i, (name, _) in enumerate(found) if _FINDINGS.fullmatch(name)), len(found))
    findings = found[first][1] if first < len(found) else ""
    impressions = [(i < first, i, body) for i, (name, body) in enumerate(found) if _IMPRESSION.fullmatch(name)]
    return _paragraph(findings), _paragraph(min(impressions, default=(False, 0, ""))[2])


def _paragraph(text: str) -> str:
    return " ".join(_REPLACED.sub("___", text).split())


def source_of(description: str) -> str:
    """The kind of image by the description of a report: `CT`, `MR`, `ultrasound`, `chest x-ray` or `other`."""
    return next((name for name, words in _SOURCES if words.search(description.upper())), OTHER)


@dataclass(frozen=True)
class RadiologyReports(FilePiece):
    """The radiology reports of a table of notes, `row_id`, `subject_id`, `hadm_id`, `description`, `source`, `findings` and
    `impression` of each. Other notes are counted by why they are left out."""

    def read(self) -> Iterator[CorpusRows]:
        csv.field_size_limit(sys.maxsize)
        records: list[dict[str, Any]] = []
        left_out: list[BadRow] = []
        for note in self._notes():
            reason, record = report_of(note)
            if reason is None:
                records.append(record)
            else:
                left_out.append(_LEFT_OUT[reason])
            if len(records) + len(left_out) >= ROWS_AT_A_TIME:
                yield self._rows(records, left_out)
                records, left_out = [], []
        yield self._rows(records, left_out)

    def _rows(self, records: list[dict[str, Any]], left_out: list[BadRow]) -> Records:
        return Records(records, lambda row: f"{self.name} note {records[row]['row_id']}", self.file.source, bad=left_out)

    def _notes(self) -> Iterator[dict[str, str]]:
        """The columns that are needed of every note. Raises DataError for a file that is no table of notes."""
        with self.file.readable(), self.file.stream(unpacked=True) as stream:
            reader = csv.reader(io.TextIOWrapper(stream, "utf-8", newline=""), strict=True)
            try:
                header = [name.removeprefix(BYTE_ORDER_MARK).strip().upper() for name in next(reader, [])]
                missing = [name for name in COLUMNS if name not in header]
                if missing:
                    raise DataError(f"{self.name}: no column {', '.join(missing)}. Give MIMIC-III's NOTEEVENTS.csv or .csv.gz.")
                places = {name: header.index(name) for name in COLUMNS}
                for values in reader:
                    if len(values) == len(header):
                        yield {name: values[place] for name, place in places.items()}
                    elif values:
                        problem = f"{len(values)} values for {len(header)} columns. Give the file as it was downloaded."
                        raise DataError(f"{self.name}: the note before line {reader.line_num + 1:,} has {problem}")
            except (csv.Error, UnicodeDecodeError) as error:
                why = str(error) if isinstance(error, csv.Error) else "not UTF-8 text"
                raise DataError(
                    f"{self.name} line {reader.line_num:,}: not CSV ({why}). Give the file as it was downloaded."
                ) from error


def report_of(note: dict[str, str]) -> tuple[str | None, dict[str, Any]]:
    """Why a note is no example, or None and its row."""
    if note["CATEGORY"].strip().lower() != "radiology":
        return ANOTHER_CATEGORY, {}
    if note["ISERROR"].strip() not in {"", "0"}:
        return MARKED_AS_ERROR, {}
    findings, impression = sections(note["TEXT"])
    if not findings or not impression:
        return NO_IMPRESSION if findings else NO_FINDINGS, {}
    kept = {name.lower(): note[name] for name in ("ROW_ID", "SUBJECT_ID", "HADM_ID", "DESCRIPTION")}
    return None, kept | {"source": source_of(note["DESCRIPTION"]), "findings": findings, "impression": impression}


_LEFT_OUT = {reason: BadRow(reason, "") for reason in (ANOTHER_CATEGORY, MARKED_AS_ERROR, NO_FINDINGS, NO_IMPRESSION)}
