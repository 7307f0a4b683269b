"""MIMIC-III's radiology reports: findings and impression out of a table of notes. All notes here are invented."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import random
import re
from pathlib import Path
from typing import Any

import pytest

from s2l_ray.config import ExamplesConfig, RunConfig, parse_config
from s2l_ray.errors import DataError
from s2l_ray.examples.corpus import corpus_identity, examples_recipe
from s2l_ray.examples.cutting import cut_corpus, sample_corpus
from s2l_ray.examples.fields import normalise
from s2l_ray.examples.mimic import sections, source_of
from s2l_ray.examples.rows import ROWS_AT_A_TIME
from s2l_ray.pipeline import run

from .test_evaluation import encoder_folder

HEADER = ["ROW_ID", "SUBJECT_ID", "HADM_ID", "CHARTDATE", "CHARTTIME", "STORETIME", "CATEGORY", "DESCRIPTION"]
HEADER += ["CGID", "ISERROR", "TEXT"]
RULE = "_" * 78
HEAD = f"""[**2199-1-2**] 10:43 PM
 CHEST (PORTABLE AP)                                             Clip # [**Clip Number (Radiology) 1234**]
 Reason: cough
 Admitting Diagnosis: FEVER
{RULE}
 UNDERLYING MEDICAL CONDITION:
  81 year old with cough
 REASON FOR THIS EXAMINATION:
  pneumonia?
 PROVISIONAL FINDINGS IMPRESSION (PFI):  A first look that does not count.
{RULE}
                                 FINAL REPORT
 INDICATION:  Cough.

 COMPARISON:  [**2199-1-1**].

"""
FINDINGS = ' FINDINGS:  The "left" lung is clear,\n the right one, too.\n\n LUNGS:  No nodule.\n\n'
IMPRESSION = " IMPRESSION:\n 1.  No pneumonia.\n 2.  Seen by Dr. [**Last Name (STitle) 77**] on [**2199-1-2**].\n"
PLAIN = ('The "left" lung is clear, the right one, too. LUNGS: No nodule.', "1. No pneumonia. 2. Seen by Dr. ___ on ___.")
PAGES = (
    f"                                                             (Over)\n\n[**2199-1-2**] 10:43 PM\n"
    f" CT HEAD    Clip # 12\n{RULE}\n"
    "                                 FINAL REPORT\n (Cont)\n"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HEAD + FINDINGS + IMPRESSION, PLAIN),
        ((HEAD + FINDINGS + IMPRESSION).replace("\n", "\r\n"), PLAIN),
        (HEAD + FINDINGS.replace("too.\n", f"too.\n{PAGES}") + IMPRESSION, PLAIN),
        (HEAD + FINDINGS + IMPRESSION + f"{RULE}\n FINAL ADDENDUM\n ADDENDUM:\n Read again.\n IMPRESSION: Changed.\n", PLAIN),
        (HEAD + " ADDENDUM:  Read again.\n\n ADDENDUM #2: And again.\n\n" + FINDINGS + IMPRESSION, PLAIN),
        (HEAD + FINDINGS + IMPRESSION + " RECOMMENDATION:  Come back.\n", PLAIN),
        (HEAD + FINDINGS + " CONCLUSION: none\n" + IMPRESSION, PLAIN),
        (HEAD + IMPRESSION + FINDINGS, PLAIN),
        ("FINDINGS:  Clear.\nImpression:  Normal.", ("Clear.", "Normal.")),
        ("FINDINGS: CT OF IT: Clear.\n IMPRESSION: The findings: normal.", ("CT OF IT: Clear.", "The findings: normal.")),
        (HEAD + FINDINGS, (PLAIN[0], "")),
        (HEAD + IMPRESSION, ("", PLAIN[1])),
        (HEAD + " FINDINGS AND IMPRESSION:  Clear.\n", ("", "")),
        (HEAD + " FINDINGS:\n\n" + IMPRESSION, ("", PLAIN[1])),
        (HEAD + FINDINGS + " IMPRESSION:\n", (PLAIN[0], "")),
        ("", ("", "")),
        ("Nothing of the kind.", ("", "")),
    ],
)  # fmt: skip
def test_the_first_findings_and_the_impression_after_them_count(text, expected):
    assert sections(text) == expected


@pytest.mark.parametrize(
    ("description", "source"),
    [
        ("CT HEAD W/O CONTRAST", "CT"), ("CTA CHEST W&W/O C&RECONS", "CT"), ("MR HEAD W & W/O CONTRAST", "MR"),
        ("MRA BRAIN", "MR"), ("CHEST (PORTABLE AP)", "chest x-ray"), ("LIVER OR GALLBLADDER US (SINGLE ORGAN)", "ultrasound"),
        ("RENAL U.S.", "other"), ("BILAT LOWER EXT VEINS DUPLEX", "ultrasound"), ("Chest (Pa & Lat)", "chest x-ray"),
        ("ACT ABDOMEN", "other"), ("", "other"),
    ],
)  # fmt: skip
def test_the_kind_of_image_is_the_source(description, source):
    assert source_of(description) == source


def note(row_id: int, text: str, **values: str) -> dict[str, str]:
    known = {
        "ROW_ID": str(row_id),
        "SUBJECT_ID": "7",
        "CATEGORY": "Radiology",
        "DESCRIPTION": "CHEST (PORTABLE AP)",
        "TEXT": text,
    }
    return dict.fromkeys(HEADER, "") | known | values


def write_notes(path: Path, notes: list[dict[str, str]], newline: str = "\n") -> Path:
    """A table of notes as PhysioNet has it: every text in quotation marks."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, HEADER, quoting=csv.QUOTE_NONNUMERIC, lineterminator=newline)
    writer.writeheader()
    writer.writerows(notes)
    data = table.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


NOTES = [
    note(1, HEAD + FINDINGS + IMPRESSION, HADM_ID="19"),
    note(2, HEAD + FINDINGS + IMPRESSION, CATEGORY="Nursing"),
    note(3, HEAD + FINDINGS + IMPRESSION, ISERROR="1"),
    note(4, HEAD + FINDINGS),
    note(5, HEAD + IMPRESSION),
    note(6, HEAD + " FINDINGS:  A stone.\n" + IMPRESSION, DESCRIPTION="CT ABDOMEN"),
    note(7, HEAD + FINDINGS + IMPRESSION, CATEGORY="Radiology "),  # a copy of the first
]


def examples_of(path: Path, **values: Any) -> ExamplesConfig:
    return ExamplesConfig.model_validate({"dataset": {"mimic_radiology": str(path)}, "held_out_fraction": 0.0, **values})


@pytest.mark.parametrize(("name", "newline"), [("NOTEEVENTS.csv.gz", "\n"), ("NOTEEVENTS.csv", "\r\n")])
def test_reports_become_pairs_and_other_notes_are_counted_by_reason(tmp_path, name, newline):
    config = examples_of(write_notes(tmp_path / name, NOTES, newline))
    ((piece,),) = cut_corpus(config)
    (examples,) = (normalise(rows, config) for rows in piece.read())
    rows = examples.table.select(["example_id", "source", "prompt", "response"]).to_pylist()
    assert rows[0] == {"example_id": "1", "source": "chest x-ray", "prompt": PLAIN[0], "response": PLAIN[1]}
    assert [(row["example_id"], row["source"]) for row in rows[1:]] == [("6", "CT"), ("7", "chest x-ray")]
    own = json.loads(examples.table["row_json"][0].as_py())
    assert (own["row_id"], own["subject_id"], own["hadm_id"], own["description"]) == ("1", "7", "19", "CHEST (PORTABLE AP)")
    dropped = {"another_category": 1, "marked_as_error": 1, "no_findings": 1, "no_impression": 1}
    assert examples.dropped.by_reason == dropped
    assert examples.dropped.num_bad == 0, "they count as no mistake of the corpus"
    assert sample_corpus(config, 10) == (0, []), "a plan does not read two million notes"


def run_config(path: Path) -> RunConfig:
    named = {"model": "none"}
    examples = {
        "dataset": {"mimic_radiology": str(path)},
        "held_out_fraction": 0.0,
        "prompt_template": "Findings: {findings}\n",
    }
    sections = {"examples": examples, "proxy": named, "selection": {"budget": 1}, "target": named, "report": {"texts": "none"}}
    return parse_config({"name": "notes", **sections})


def test_a_run_takes_the_reports_and_says_what_it_left_out_and_no_text(tmp_path, ray_session, caplog):
    config = run_config(write_notes(tmp_path / "NOTEEVENTS.csv.gz", NOTES))
    with caplog.at_level(logging.INFO):
        made = run(config, str(tmp_path / "run"), until="examples")["examples"]
    assert made.summary["dropped"] == {
        "another_category": 1, "duplicate": 1, "marked_as_error": 1, "no_findings": 1, "no_impression": 1,
    }  # fmt: skip
    assert made.summary["sources"] == {"CT": {"pool": 1, "held_out": 0}, "chest x-ray": {"pool": 1, "held_out": 0}}
    (part,) = made.parts()
    assert made.read_table(part, ["prompt"])["prompt"].to_pylist()[0] == f"Findings: {PLAIN[0]}\n"
    assert "lung" not in caplog.text


WORDS = "lungs clear heart cardiomegaly small effusion left right nodule fracture stone liver"


def many_notes(number: int) -> list[dict[str, str]]:
    generator = random.Random(3)
    notes = []
    for i in range(number):
        seen = " ".join(generator.choices(WORDS.split(), k=6))
        text = f"{HEAD} FINDINGS:  The {seen}.\n\n IMPRESSION:\n  {seen.title()}.\n"
        notes.append(note(i, text, DESCRIPTION=("CHEST (PA & LAT)", "CT HEAD W/O CONTRAST")[i % 2]))
    return notes


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_summaries_of_a_whole_run_get_their_scores_and_are_shown_nowhere(tmp_path, ray_session, caplog):
    shape = {"architecture": "gpt_neox", "layers": 1, "hidden": 16, "heads": 2, "max_positions": 128}
    training = {"model": {"scratch": shape}, "epochs": 1, "global_batch_size": 8, "learning_rate": 1.0e-2, "max_tokens": 128}
    one = {"num_workers": 1, "cpus_per_worker": 1}
    encoder = encoder_folder(tmp_path / "encoder", "roberta", model_max_length=32)
    summaries = {"summary_sources": ["chest x-ray", "CT"], "bert_score_model": str(encoder), "max_new_tokens": 8}
    values = run_config(write_notes(tmp_path / "NOTEEVENTS.csv.gz", many_notes(120))).model_dump(mode="json")
    values["examples"]["held_out_fraction"] = 0.2
    values |= {
        "proxy": {"tokenizer": {"train": "bpe", "vocab_size": 300}, "num_checkpoints": 3, **training},
        "clustering": {"num_clusters": 4},
        "selection": {"budget": 0.5},
        "target": {"zero_stage": 0, **training},
        "evaluation": summaries,
        "machines": dict.fromkeys(("examples", "proxy", "trajectories", "target", "evaluation"), one),
    }
    with caplog.at_level(logging.INFO):
        run(parse_config(values), str(tmp_path / "run"))
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    for model in ("untrained", "selected"):
        assert set(metrics[model]["tasks"]) == {"chest x-ray", "CT"}
        for scores in metrics[model]["tasks"].values():
            assert set(scores) == {"rougeL", "bleu", "bert_score", "rows"}
            assert -1 <= scores["bert_score"] <= 1
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "CT: bert_score" in page
    predictions = (tmp_path / "run" / "evaluation" / "predictions.jsonl").read_text()
    assert "bert_score" in predictions
    assert not [word for word in WORDS.split() if len(word) > 5 and word in (page + predictions + caplog.text).lower()]


def test_the_same_notes_are_the_same_corpus_wherever_they_lie(tmp_path):
    one, other = (write_notes(tmp_path / name, NOTES) for name in ("a.csv", "b.csv"))
    more = write_notes(tmp_path / "c.csv", NOTES[:-1])
    identities = [corpus_identity(examples_of(path)) for path in (one, other, more)]
    assert identities[0] == identities[1] != identities[2]
    assert re.fullmatch(r"mimic_radiology:[0-9a-f]{32}", identities[0])
    template = examples_of(one, prompt_template="{findings}")
    assert examples_recipe(template, identities[0]) != examples_recipe(examples_of(one), identities[0])


def test_notes_are_read_as_a_stream(tmp_path):
    """The first rows are there before the table is read to its end, where it is broken."""
    path = write_notes(tmp_path / "NOTEEVENTS.csv", [note(i, "words", CATEGORY="Nursing") for i in range(ROWS_AT_A_TIME + 5)])
    path.write_bytes(path.read_bytes() + b'"1","half a row')
    ((piece,),) = cut_corpus(examples_of(path))
    batches = piece.read()
    assert len(next(batches).bad) == ROWS_AT_A_TIME
    with pytest.raises(DataError, match=r"NOTEEVENTS\.csv line .*not CSV \(unexpected end of data\)"):
        next(batches)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"id,text\n1,secret\n", r"no column ROW_ID, .*ISERROR\. Give MIMIC-III's NOTEEVENTS\.csv"),
        ((",".join(HEADER) + "\n1,secret\n").encode(), "has 2 values for 11 columns"),
        ((",".join(HEADER) + "\n").encode() + b'1,,,,,,Radiology,,,,"\xff secret"\n', "not CSV \\(not UTF-8 text\\)"),
        ((",".join(HEADER) + '\n1,,,,,,Radiology,,,,"secret" or\n').encode(), "not CSV"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_table_of_notes_is_refused_without_its_text(tmp_path, data, problem):
    (tmp_path / "notes.csv").write_bytes(data)
    ((piece,),) = cut_corpus(examples_of(tmp_path / "notes.csv"))
    with pytest.raises(DataError, match=problem) as refused:
        list(piece.read())
    assert "secret" not in str(refused.value)
