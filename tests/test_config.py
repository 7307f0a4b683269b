"""The config: what a user writes, and what they are told where it is wrong."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import yaml

from s2l_ray.config import RunConfig, load_config, parse_config, template_fields
from s2l_ray.config.section import is_section, types_of
from s2l_ray.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
MINIMAL = {
    "name": "run",
    "examples": {"dataset": "corpus.jsonl"},
    "proxy": {"model": "small"},
    "selection": {"budget": 100},
    "target": {"model": "large"},
}


def changed(**sections: object) -> dict[str, object]:
    return MINIMAL | {name: {**MINIMAL.get(name, {}), **value} for name, value in sections.items()}


def test_numbers_that_yaml_reads_as_text_simply_work():
    text = yaml.safe_load("proxy: {model: m, learning_rate: 2e-5, weight_decay: 1E-2}\nselection: {budget: 1e3}")
    config = parse_config(MINIMAL | text)
    assert config.proxy.learning_rate == 2e-5
    assert config.proxy.weight_decay == 0.01
    assert config.selection.budget == 1000


@pytest.mark.parametrize(
    ("budget", "meaning"),
    [
        (30, 30),
        ("30", 30),
        (0.25, 0.25),
        ("0.25", 0.25),
        (50.0, 50),
        ({"tokens": 9}, {"tokens": 9}),
        ({"tokens": "9"}, {"tokens": 9}),
    ],
)
def test_a_budget_is_examples_a_fraction_or_tokens(budget, meaning):
    assert parse_config(changed(selection={"budget": budget})).selection.budget == meaning


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"clustering": {"num_cluster": 5}}, r"clustering\.num_cluster: no such key\. Did you mean 'num_clusters'\?"),
        ({"clusterin": {}}, r"clusterin: no such key\. Did you mean 'clustering'\?"),
        ({"proxy": {"model": {"scratch": {"layer": 2, "hidden": 8}}}}, r"proxy\.model\.scratch\.layer: .*'layers'"),
        ({"selection": {"budget": 0}}, r"selection\.budget: must be above 0, found 0"),
        ({"selection": {"budget": -0.5}}, r"selection\.budget: must be above 0"),
        ({"selection": {"budget": 1.5}}, r"selection\.budget: 1\.5 is neither"),
        ({"selection": {"budget": "many"}}, r"selection\.budget: 'many' is not a number"),
        ({"selection": {"budget": {"tokens": 0}}}, r"selection\.budget\.tokens: .*greater than or equal to 1, found 0"),
        ({"selection": {"budget": True}}, r"selection\.budget: a budget is"),
        ({"examples": {"held_out_fraction": 1.0}}, r"examples\.held_out_fraction: .*less than 1"),
        ({"examples": {"prompt_template": "{a.b}"}}, r"'\{a\.b\}' is not a plain field name"),
        ({"examples": {"prompt_template_if_empty": "{a}"}}, r"needs prompt_template"),
        ({"proxy": {"learning_rate": "fast"}}, r"proxy\.learning_rate: .*number.*'fast'"),
        ({"proxy": {"learning_rate": float("nan")}}, r"proxy\.learning_rate: .*finite"),
        ({"proxy": {"model": {"scratch": {"layers": 1, "hidden": 10, "heads": 3}}}}, r"heads=3 does not divide hidden=10"),
        ({"proxy": {"model": {"scratch": {"layers": 1, "hidden": 8}}}}, r"proxy\.tokenizer is missing"),
        ({"evaluation": {"answer_pattern": "answer"}}, r"needs exactly one group, found 0"),
        ({"evaluation": {"answer_pattern": "("}}, r"not a regular expression"),
        ({"examples": {"dataset": {"reasoning_gym": {"tasks": {"gcd": {}}}}}}, r"task 'gcd' needs size"),
        (
            {"examples": {"dataset": {"reasoning_gim": {}}}},
            r"reasoning_gim: no such key\. Did you mean 'reasoning_gym'",
        ),
        ({"examples": {"dataset": {"reasoning_gym": 5}}}, r"examples\.dataset\.reasoning_gym: .*found 5"),
        ({"examples": {"dataset": {"mimic_radiology": {}}}}, r"examples\.dataset\.mimic_radiology: .*string, found"),
        ({"target": {"zero_stage": 4}}, r"target\.zero_stage: .*0, 1, 2 or 3, found 4"),
        ({"machines": {"proxy": {"num_workers": 0}}}, r"machines\.proxy\.num_workers: "),
    ],
)
def test_a_mistake_is_named_with_its_place_and_remedy(sections, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(changed(**sections))
    assert "validation error" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_all_mistakes_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_config(changed(proxy={"epochs": -1, "seeed": 3}, target={"max_tokens": 0}))
    assert len(str(caught.value).splitlines()) == 3


def test_set_overrides_a_value_and_keeps_its_type(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    config = load_config(path, ["clustering.num_clusters=7", "selection.budget=0.5", "proxy.learning_rate=1e-3"])
    assert (config.clustering.num_clusters, config.selection.budget, config.proxy.learning_rate) == (7, 0.5, 1e-3)


TEXTS = [
    ("examples.prompt_template", "{instruction}"),
    ("examples.prompt_template", "{a}: {b} # c"),
    ("examples.prompt_template", '"{a}" '),
    ("examples.dataset", "19"),
    ("examples.dataset", "*.jsonl"),
    ("examples.dataset", "[ab]*.jsonl"),
    ("examples.prompt_field", "yes"),
    ("examples.split", "null"),
    ("examples.subset", "2024-01-01"),
    ("examples.subset", "2024-13-45"),
    ("evaluation.answer_pattern", "[Aa]nswer: (.+)"),
    ("proxy.revision", "1e5"),
    ("proxy.revision", "0123456"),
    ("proxy.revision", "1234567"),
    ("proxy.revision", "1_000.50"),
    ("proxy.model", "0x10"),
    ("proxy.tokenizer", "off"),
    ("name", "2024"),
    ("plan.accelerator", "100"),
]


def value_at(config: RunConfig, place: str) -> object:
    return functools.reduce(getattr, place.split("."), config)


@pytest.mark.parametrize(("place", "text"), TEXTS)
def test_set_gives_a_field_of_text_the_text_as_it_stands(tmp_path, place, text):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    assert value_at(load_config(path, [f"{place}={text}"]), place) == text


# What YAML reads as something that is no scalar, or as nothing, has to be quoted in a file.
@pytest.mark.parametrize(("place", "text"), [(place, text) for place, text in TEXTS if text[0].isalnum() and text != "null"])
def test_a_file_gives_a_field_of_text_the_text_as_it_is_written(tmp_path, place, text):
    section, _, field = place.rpartition(".")
    values = changed(**{section: {field: "HERE"}}) if section else MINIMAL | {field: "HERE"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values).replace("HERE", text))
    assert value_at(load_config(tmp_path / "run.yaml"), place) == text


def test_lists_mappings_and_sections_have_their_texts_as_they_are_written(tmp_path):
    (tmp_path / "run.yaml").write_text("""
name: run
examples: {dataset: [19, 020], where: {2024: 1, deep: [on, 2]}}
proxy: {model: small}
selection: {budget: 100}
target: {tokenizer: {train: bpe}, model: {scratch: {architecture: 1, layers: 010, hidden: 8}}}
evaluation: {summary_sources: [1e3, 007]}
""")
    config = load_config(tmp_path / "run.yaml", ["target.lora={target_modules: [q_proj, 1]}", "proxy.checkpoints=[12, step-1]"])
    assert config.examples.dataset == ["19", "020"]
    assert config.examples.where == {"2024": 1, "deep": [True, 2]}
    assert config.evaluation.summary_sources == ["1e3", "007"]
    assert (config.target.model.scratch.architecture, config.target.model.scratch.layers) == ("1", 8)
    assert config.target.lora.target_modules == ["q_proj", "1"]
    assert config.proxy.checkpoints == ["12", "step-1"]


@pytest.mark.parametrize("nothing", ["null", "none", "~", ""])
def test_an_optional_text_is_taken_away_again(tmp_path, nothing):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(changed(proxy={"revision": "main", "tokenizer": "other"})))
    config = load_config(path, [f"proxy.revision={nothing}", f"proxy.tokenizer={nothing}"])
    assert (config.proxy.revision, config.proxy.tokenizer) == (None, None)


def test_a_value_that_only_looks_like_yaml_is_refused_with_how_to_quote_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError, match=r"kind=\*a: .* is quoted twice.*--set 'examples\.where\.kind=\"...\"'"):
        load_config(path, ["examples.where.kind=*a"])
    assert load_config(path, ['examples.where.kind="*a"']).examples.where == {"kind": "*a"}


@pytest.mark.parametrize("again", ["name: other\n", "plan: {accelerator: H100, accelerator: A100}\n"])
def test_a_key_that_occurs_twice_is_named_with_its_line(tmp_path, again):
    text = yaml.safe_dump(MINIMAL)
    (tmp_path / "run.yaml").write_text(text + again)
    line = len(text.splitlines()) + 1
    with pytest.raises(ConfigError, match=rf"run\.yaml: .*line {line}: the key '(name|accelerator)' occurs twice"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("override", ["clustering", "=5", "name.x=1", "clustering.num_clusters=[1"])
def test_an_override_that_cannot_be_read_is_refused(tmp_path, override):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError, match="--set"):
        load_config(path, [override])


@pytest.mark.parametrize("text", ["- a list", "a: [", "just text"])
def test_a_file_that_is_no_config_is_refused_by_name(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(path)


def test_a_missing_config_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*No such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_every_field_explains_itself():
    for name, field in RunConfig.model_fields.items():
        section = next(kind for kind in types_of(field.annotation) if is_section(kind) or name in ("name", "trackers"))
        if name in ("name", "plan", "trackers"):
            continue
        assert section.__doc__, name
        for key, inner in section.model_fields.items():
            assert inner.description or name == "machines", f"{name}.{key} has no docstring"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_is_valid_and_short(path):
    assert load_config(path).name == path.stem
    assert len(path.read_text().splitlines()) <= 60


def test_template_fields_are_found_in_order():
    assert template_fields("### {instruction}\n{{json}} {input}") == ["instruction", "input"]


@pytest.mark.parametrize("text", ["name: 0b_", "name: 1:2:x", "a: &a [*a]", "name: " + "[" * 5000])
def test_a_file_that_yaml_cannot_build_is_one_error(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path)
